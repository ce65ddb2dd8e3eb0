// The innermost loops of the quantizer, along a row, for each set of instructions.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kimisys::reshard {

// Bits of bfloat16 (16) or float32 (32) elements, signed: the widest integers that every processor
// can compare. Bits of magnitudes order as their values do, infinity and NaN largest.
template <typename Signed>
struct QuantizeLoops {
  // most[i] = max(most[i], bits of |row[i]|)
  void (*maxima)(std::int64_t n, const std::byte* row, Signed* most);
  // values[i] = the float8_e4m3fn nearest to row[i] * inverse[i], whose magnitude is at most 464
  void (*values)(std::int64_t n, const std::byte* row, const float* inverse, std::byte* values);
};

struct QuantizeRows {
  std::string_view name;
  QuantizeLoops<std::int16_t> bfloat16;
  QuantizeLoops<std::int32_t> float32;
};

// Those that this processor can run, fastest first, of avx512, avx2, generic.
std::span<const QuantizeRows> quantize_rows();

// The bits of |value| <= 464 without branches. Adding 2^20 times the power of two below makes the
// processor round: the last bits of the sum count steps of float8. Subnormal numbers have the steps
// of the smallest normal one.
constexpr std::uint8_t float8_in_range(float value) {
  constexpr std::uint32_t kSmallestNormal = 121U << 23U;  // 2^-6
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const std::uint32_t at_least = magnitude < kSmallestNormal ? kSmallestNormal : magnitude;
  const std::uint32_t exponent = at_least & 0x7f800000U;
  const std::uint32_t shifter = exponent + (20U << 23U);
  const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(shifter);
  const std::uint32_t steps = std::bit_cast<std::uint32_t>(sum) - shifter;
  // An exponent more is 8 steps more; the steps of a normal number begin at 8.
  const std::uint32_t rounded = steps + ((exponent - kSmallestNormal) >> 20U);
  return static_cast<std::uint8_t>(rounded | ((bits >> 24U) & 0x80U));
}

}  // namespace kimisys::reshard
