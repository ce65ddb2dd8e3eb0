#include "reshard/quantize_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

namespace kimisys::reshard {
namespace {

// DeepGEMM's: blocks of magnitudes below the first share the scale of that magnitude.
constexpr float kSmallestAmax = 1e-4F;
constexpr float kLargestFloat8 = 448.0F;

float scale_of(float amax) { return std::max(amax, kSmallestAmax) / kLargestFloat8; }

void store(std::byte* scales, std::int64_t block, float scale) {
  std::memcpy(scales + block * std::int64_t{sizeof(float)}, &scale, sizeof(float));
}

template <typename Signed>
float value_of(Signed bits) {
  std::byte element[sizeof(Signed)];
  std::memcpy(element, &bits, sizeof(Signed));
  return float_at(element, sizeof(Signed) == 2 ? DType::kBFloat16 : DType::kFloat32);
}

// Rows of the first sweep that are fetched before their turn. Processors fetch ahead within a page
// by themselves; a row is mostly a page of its own.
constexpr std::int64_t kAhead = 8;

void prefetch(const std::byte* begin, std::int64_t nbytes) {
  constexpr std::int64_t kLine = 64;
  for (std::int64_t i = 0; i < nbytes; i += kLine) __builtin_prefetch(begin + i, 0, 2);
}

// Row after row over all the blocks at once, so that the source is read in long runs; the second
// sweep finds it in the caches.
template <typename Signed>
bool sweep(const BlockRow& it, const QuantizeLoops<Signed>& loops) {
  constexpr auto kItem = std::int64_t{sizeof(Signed)};
  const auto columns = static_cast<std::size_t>(it.columns);
  std::vector<Signed> most(columns, Signed{0});
  std::vector<float> inverse(columns);
  const bool is_dense = it.column_stride == kItem;
  const std::int64_t row_bytes = is_dense ? it.columns * kItem : 0;
  std::vector<std::byte> gathered(is_dense ? 0 : columns * sizeof(Signed));
  const auto row_at = [&](std::int64_t row) {
    const std::byte* from = it.source + row * it.row_stride;
    if (is_dense) return from;
    for (std::int64_t i = 0; i < it.columns; ++i) {
      std::memcpy(gathered.data() + i * kItem, from + i * it.column_stride, kItem);
    }
    return static_cast<const std::byte*>(gathered.data());
  };
  for (std::int64_t row = 0; row < it.rows; ++row) {
    if (row + kAhead < it.rows) prefetch(it.source + (row + kAhead) * it.row_stride, row_bytes);
    loops.maxima(it.columns, row_at(row), most.data());
  }
  if (!std::isfinite(value_of(*std::max_element(most.begin(), most.end())))) return false;
  for (std::int64_t first = 0; first < it.columns; first += it.block_columns) {
    const std::int64_t end = std::min(it.columns, first + it.block_columns);
    const float scale = scale_of(value_of(*std::max_element(&most[0] + first, &most[0] + end)));
    store(it.scales, first / it.block_columns, scale);
    std::fill(&inverse[0] + first, &inverse[0] + end, 1.0F / scale);
  }
  for (std::int64_t row = 0; row < it.rows; ++row) {
    if (row < it.next.rows) {
      prefetch(it.next.source + row * it.next.row_stride, it.next.row_bytes);
    }
    loops.values(it.columns, row_at(row), inverse.data(), it.values + row * it.value_stride);
  }
  return true;
}

}  // namespace

bool quantize_blocks(const BlockRow& blocks, const QuantizeRows& rows) {
  return blocks.dtype == DType::kBFloat16 ? sweep(blocks, rows.bfloat16)
                                          : sweep(blocks, rows.float32);
}

bool quantize_blocks_naive(const BlockRow& it) {
  const auto at = [&it](std::int64_t row, std::int64_t column) {
    return float_at(it.source + row * it.row_stride + column * it.column_stride, it.dtype);
  };
  for (std::int64_t row = 0; row < it.rows; ++row) {
    for (std::int64_t column = 0; column < it.columns; ++column) {
      if (!std::isfinite(at(row, column))) return false;
    }
  }
  for (std::int64_t first = 0; first < it.columns; first += it.block_columns) {
    const std::int64_t end = std::min(it.columns, first + it.block_columns);
    float amax = 0;
    for (std::int64_t row = 0; row < it.rows; ++row) {
      for (std::int64_t column = first; column < end; ++column) {
        amax = std::max(amax, std::abs(at(row, column)));
      }
    }
    const float scale = scale_of(amax);
    const float inverse = 1.0F / scale;
    store(it.scales, first / it.block_columns, scale);
    for (std::int64_t row = 0; row < it.rows; ++row) {
      for (std::int64_t column = first; column < end; ++column) {
        it.values[row * it.value_stride + column] =
            std::byte{float8_bits(at(row, column) * inverse)};
      }
    }
  }
  return true;
}

float float_at(const std::byte* element, DType dtype) {
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, element, sizeof(bits));
  return std::bit_cast<float>(float32_bits(bits));
}

std::uint8_t float8_bits(float value) {
  const float magnitude = std::abs(value);
  const auto sign = static_cast<std::uint8_t>(std::signbit(value) ? 0x80 : 0);
  if (!(magnitude <= 464.0F)) return sign | 0x7fU;
  // The step between neighbours: 2^-9 for subnormals, else 2^-3 of the power of two below.
  const int exponent = magnitude < 0.015625F ? -6 : std::ilogb(magnitude);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  // Steps of a normal number begin at 8; a carry to 16 is the next exponent's 8.
  const int bits = magnitude < 0.015625F ? steps : ((exponent + 7) << 3) + (steps - 8);
  return static_cast<std::uint8_t>(sign | bits);
}

}  // namespace kimisys::reshard
