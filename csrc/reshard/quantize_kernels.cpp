#include "reshard/quantize_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "reshard/stream.h"

// This file is compiled with -ffp-contract=off: a multiplication fused with the addition that
// rounds it would round once where the definition rounds twice.

namespace kimisys::reshard {
namespace {

float scale_of(float amax) { return std::max(amax, kSmallestAmax) / kLargestFloat8; }

void store(std::byte* scales, std::int64_t block, float scale) {
  std::memcpy(scales + block * std::int64_t{sizeof(float)}, &scale, sizeof(float));
}

// One block after another, one element after another, as the definition says.
bool quantize_naive(const BlockRow& it) {
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

// The bits of |value| <= 464 without branches, so that loops vectorise. Below 2^-6 float8 is
// subnormal: adding 2^14, whose last bit is worth 2^-9 there, makes the processor round for us.
inline __attribute__((always_inline)) std::uint8_t float8_in_range(float value) {
  constexpr std::uint32_t kShift = 20;  // mantissa bits that float32 has more
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const float raised = std::bit_cast<float>(magnitude) + 16384.0F;
  const std::uint32_t small = std::bit_cast<std::uint32_t>(raised) - 0x46800000U;
  const std::uint32_t odd = (magnitude >> kShift) & 1U;
  const std::uint32_t normal = (magnitude - (120U << 23U) + 0x7ffffU + odd) >> kShift;
  const std::uint32_t rounded = magnitude < (121U << 23U) ? small : normal;
  return static_cast<std::uint8_t>(rounded | ((bits >> 24U) & 0x80U));
}

// Magnitudes of a row into their maxima so far. Bits of magnitudes order as their values do, and
// infinity and NaN come out largest.
template <typename Signed>
inline __attribute__((always_inline)) void raise(std::int64_t n, const std::byte* __restrict row,
                                                 Signed* __restrict most) {
  constexpr auto kMagnitude = static_cast<Signed>(sizeof(Signed) == 2 ? 0x7fff : 0x7fffffff);
  for (std::int64_t i = 0; i < n; ++i) {
    Signed bits;
    std::memcpy(&bits, row + i * std::int64_t{sizeof(Signed)}, sizeof(Signed));
    bits = static_cast<Signed>(bits & kMagnitude);
    most[i] = most[i] > bits ? most[i] : bits;
  }
}

template <typename Signed>
inline float widen(Signed bits) {
  if constexpr (sizeof(Signed) == 2) {
    return std::bit_cast<float>(float32_bits(static_cast<std::uint16_t>(bits)));
  } else {
    return std::bit_cast<float>(bits);
  }
}

template <typename Signed>
inline __attribute__((always_inline)) void round_row(std::int64_t n,
                                                     const std::byte* __restrict row,
                                                     const float* __restrict inverse,
                                                     std::byte* __restrict values) {
  for (std::int64_t i = 0; i < n; ++i) {
    Signed bits;
    std::memcpy(&bits, row + i * std::int64_t{sizeof(Signed)}, sizeof(Signed));
    values[i] = std::byte{float8_in_range(widen(bits) * inverse[i])};
  }
}

// The two loops for one set of instructions; GCC vectorises them with what `target` allows.
#define KIMISYS_QUANTIZE_LOOPS(Name, target)                                              \
  struct Name {                                                                           \
    template <typename Signed>                                                            \
    target static void maxima(std::int64_t n, const std::byte* row, Signed* most) {       \
      raise<Signed>(n, row, most);                                                        \
    }                                                                                     \
    template <typename Signed>                                                            \
    target static void values(std::int64_t n, const std::byte* row, const float* inverse, \
                              std::byte* out) {                                           \
      round_row<Signed>(n, row, inverse, out);                                            \
    }                                                                                     \
  }

KIMISYS_QUANTIZE_LOOPS(Generic, );
#if defined(__x86_64__)
KIMISYS_QUANTIZE_LOOPS(Avx2, __attribute__((target("arch=x86-64-v3"))));
KIMISYS_QUANTIZE_LOOPS(Avx512, __attribute__((target("arch=x86-64-v4"))));
#endif

// Row after row over all the blocks at once, so that the source is read in long runs; the second
// sweep finds it in the caches.
template <typename Loops, typename Signed>
bool sweep(const BlockRow& it) {
  constexpr auto kItem = std::int64_t{sizeof(Signed)};
  const auto columns = static_cast<std::size_t>(it.columns);
  std::vector<Signed> most(columns, Signed{0});
  std::vector<float> inverse(columns);
  const bool is_dense = it.column_stride == kItem;
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
    Loops::template maxima<Signed>(it.columns, row_at(row), most.data());
  }
  if (!std::isfinite(widen(*std::max_element(most.begin(), most.end())))) return false;
  for (std::int64_t first = 0; first < it.columns; first += it.block_columns) {
    const std::int64_t end = std::min(it.columns, first + it.block_columns);
    const float scale = scale_of(widen(*std::max_element(&most[0] + first, &most[0] + end)));
    store(it.scales, first / it.block_columns, scale);
    std::fill(&inverse[0] + first, &inverse[0] + end, 1.0F / scale);
  }
  for (std::int64_t row = 0; row < it.rows; ++row) {
    Loops::template values<Signed>(it.columns, row_at(row), inverse.data(),
                                   it.values + row * it.value_stride);
  }
  return true;
}

template <typename Loops>
bool quantize(const BlockRow& it) {
  return it.dtype == DType::kBFloat16 ? sweep<Loops, std::int16_t>(it)
                                      : sweep<Loops, std::int32_t>(it);
}

std::vector<QuantizeKernel> supported_kernels() {
  std::vector<QuantizeKernel> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) kernels.push_back({"avx512", quantize<Avx512>});
  if (__builtin_cpu_supports("x86-64-v3")) kernels.push_back({"avx2", quantize<Avx2>});
#endif
  kernels.push_back({"generic", quantize<Generic>});
  kernels.push_back({"naive", quantize_naive});
  return kernels;
}

}  // namespace

const std::vector<QuantizeKernel>& quantize_kernels() {
  static const std::vector<QuantizeKernel> kernels = supported_kernels();
  return kernels;
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
