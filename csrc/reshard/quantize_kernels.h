// One row of blocks after the other: what Quantizer::fill runs. Memory is checked and disjoint.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "reshard/quantize_rows.h"

namespace kimisys::reshard {

// Neighbouring blocks on real addresses; dense rows of values, strides in bytes.
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
  std::byte* scales = nullptr;  // float32, one for each block, dense; any alignment

  // What this thread reads next, to be fetched meanwhile; no rows when it is unknown.
  struct Next {
    const std::byte* source = nullptr;
    std::int64_t row_stride = 0;
    std::int64_t rows = 0;
    std::int64_t row_bytes = 0;
  };
  Next next;
};

// False when an element is NaN or infinite; nothing is written then.
bool quantize_blocks(const BlockRow& blocks, const QuantizeRows& rows);

// One block after another, one element after another, as the definition says.
bool quantize_blocks_naive(const BlockRow& blocks);

// Bits of the nearest float8_e4m3fn, ties to even; NaN beyond 464, as PyTorch casts.
std::uint8_t float8_bits(float value);

// The element as float32, exactly.
float float_at(const std::byte* element, DType dtype);

}  // namespace kimisys::reshard
