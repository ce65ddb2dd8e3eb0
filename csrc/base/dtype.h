// Element types, their names and sizes, and the two casts between float32 and bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kimisys {

enum class DType : std::uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat8E4M3FN,
  kUInt8,
  kInt8,
  kInt32,
  kInt64,
};

// The name as PyTorch spells it, without the "torch." prefix.
std::string_view dtype_name(DType dtype);

// Raises LayoutError for a name that is not in the list, and names the list.
DType parse_dtype(std::string_view name);

// Bytes of one element.
constexpr std::int64_t itemsize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat8E4M3FN:
    case DType::kUInt8:
    case DType::kInt8:
      return 1;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

// Equal dtypes of any kind, float32 -> bfloat16, bfloat16 -> float32.
constexpr bool can_cast(DType from, DType to) {
  return from == to || (from == DType::kFloat32 && to == DType::kBFloat16) ||
         (from == DType::kBFloat16 && to == DType::kFloat32);
}

// Bits of a float32 rounded to the nearest bfloat16, ties to even. Every NaN becomes 0x7fc0, the
// quiet one that PyTorch's scalar conversion yields; the carry must not turn it into infinity.
// Branch-free, so that loops over it vectorise.
constexpr std::uint16_t bfloat16_bits(std::uint32_t float_bits) {
  const std::uint32_t rounded = (float_bits + 0x7fffU + ((float_bits >> 16U) & 1U)) >> 16U;
  const bool is_nan = (float_bits & 0x7fffffffU) > 0x7f800000U;
  return static_cast<std::uint16_t>(is_nan ? 0x7fc0U : rounded);
}

// Exact.
constexpr std::uint32_t float32_bits(std::uint16_t bfloat16_bits) {
  return static_cast<std::uint32_t>(bfloat16_bits) << 16U;
}

}  // namespace kimisys
