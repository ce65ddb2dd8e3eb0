// Copies along one axis: the innermost loops of the native implementation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace kimisys::reshard {

// Copies n elements, of which element i is read at source + i * source_stride and written at
// destination + i * destination_stride. Strides in bytes; dense rows do not look at them.
using Row = void (*)(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                     std::byte* destination, std::int64_t destination_stride);

enum class RowKind {
  kStrided,
  kDense,      // elements follow one another on both sides
  kStreaming,  // dense, and written past the caches: for more bytes than they hold
};

// The row for a pair of dtypes that can_cast.
Row choose_row(DType from, DType to, RowKind kind);

// Makes what streaming rows of this thread have written visible to other threads, in order.
void finish_streaming();

}  // namespace kimisys::reshard
