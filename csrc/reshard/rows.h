// Copies along one axis: the innermost loops of the fast implementations.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/dtype.h"

namespace kimisys::reshard {

// Copies n elements, of which element i is read at source + i * source_stride and written at
// destination + i * destination_stride. Strides in bytes; dense rows do not look at them.
using Row = void (*)(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                     std::byte* destination, std::int64_t destination_stride);

enum class RowKind {
  kStrided,
  kDense,      // elements follow one another on both sides
  kStreaming,  // dense, and written past the caches; finish_streaming() ends it
};

// The rows that an instruction set does in its own way.
struct RowSet {
  struct Casts {
    Row narrow;  // float32 -> bfloat16
    Row widen;   // bfloat16 -> float32
  };
  std::string_view name;
  Casts dense;
  Casts streaming;
  std::array<Row, 4> streaming_copy;  // of elements of 1, 2, 4, 8 bytes
};

// Those that this processor can run, fastest first, of avx512, avx2, generic.
std::span<const RowSet> row_sets();

// The row for a pair of dtypes that can_cast.
Row choose_row(DType from, DType to, RowKind kind, const RowSet& set);

}  // namespace kimisys::reshard
