// The implementations behind Quantizer::fill. Memory is checked and disjoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace kimisys::reshard {

// The blocks of one unit on real addresses; dense rows of values, strides in bytes.
struct BlockRow {
  const std::byte* source = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
  DType dtype = DType::kBFloat16;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t block_columns = 0;
  std::byte* values = nullptr;
  std::int64_t value_stride = 0;
  std::byte* scales = nullptr;  // float32, one for each block of the unit, dense; any alignment
};

// False when an element is NaN or infinite; nothing of the unit is written then.
using QuantizeBlocks = bool (*)(const BlockRow& blocks);

struct QuantizeKernel {
  std::string_view name;
  QuantizeBlocks run;
};

// Those that this processor can run, fastest first: avx512, avx2, generic, naive.
const std::vector<QuantizeKernel>& quantize_kernels();

// Bits of the nearest float8_e4m3fn, ties to even; NaN beyond 464, as torch casts.
std::uint8_t float8_bits(float value);

// The element as float32, exactly.
float float_at(const std::byte* element, DType dtype);

// Elements of magnitude below this do not lower the scale any more.
inline constexpr float kSmallestAmax = 1e-4F;
inline constexpr float kLargestFloat8 = 448.0F;

}  // namespace kimisys::reshard
