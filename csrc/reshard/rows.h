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
// destination + i * destination_stride. Strides in bytes.
using Row = void (*)(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                     std::byte* destination, std::int64_t destination_stride);

enum class RowKind {
  kStrided,
  kGathered,   // the destination is dense, and written past the caches
  kDense,      // both sides are dense
  kStreaming,  // both sides are dense, and the destination is written past the caches
};

// The rows of one kind.
struct Rows {
  Row narrow;               // float32 -> bfloat16
  Row widen;                // bfloat16 -> float32
  std::array<Row, 4> copy;  // elements of 1, 2, 4, 8 bytes
};

// All rows for one instruction set.
struct RowSet {
  std::string_view name;
  std::array<Rows, 4> kinds;  // by RowKind
};

// Those that this processor can run, fastest first, of avx512, avx2, generic.
std::span<const RowSet> row_sets();

// The row for a pair of dtypes that can_cast. After rows written past the caches, the thread calls
// finish_streaming().
Row choose_row(DType from, DType to, RowKind kind, const RowSet& set);

}  // namespace kimisys::reshard
