#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "reshard/kernels.h"
#include "reshard/rows.h"

namespace kimisys::reshard {
namespace {

// Drops axes of extent 1, sorts the others so that the destination is written forwards, and merges
// neighbours that are contiguous on both sides. At least one axis remains.
void collapse(Block& block) {
  std::array<Block::Axis, kMaxDims> sorted = {};
  std::size_t count = 0;
  for (std::size_t d = 0; d < block.dims; ++d) {
    if (block.axes[d].extent != 1) sorted[count++] = block.axes[d];
  }
  const auto first = sorted.begin();
  std::stable_sort(first, first + static_cast<std::ptrdiff_t>(count),
                   [](const Block::Axis& a, const Block::Axis& b) {
                     return a.destination_stride > b.destination_stride;
                   });
  block.dims = 0;
  for (std::size_t d = 0; d < count; ++d) {
    const Block::Axis& inner = sorted[d];
    if (block.dims > 0) {
      Block::Axis& outer = block.axes[block.dims - 1];
      if (outer.source_stride == inner.source_stride * inner.extent &&
          outer.destination_stride == inner.destination_stride * inner.extent) {
        outer = {outer.extent * inner.extent, inner.source_stride, inner.destination_stride};
        continue;
      }
    }
    block.axes[block.dims++] = inner;
  }
  if (block.dims == 0) {
    block.axes[block.dims++] = {1, itemsize(block.source_dtype), itemsize(block.destination_dtype)};
  }
}

std::int64_t bytes_of(const Block& block) {
  std::int64_t bytes = itemsize(block.destination_dtype);
  for (std::size_t d = 0; d < block.dims; ++d) bytes *= block.axes[d].extent;
  return bytes;
}

// Cuts a block along its outermost axes into blocks of at most about `limit` bytes.
void split(const Block& block, std::size_t axis, std::int64_t limit, std::vector<Block>& parts) {
  const std::int64_t bytes = bytes_of(block);
  if (bytes <= limit || axis == block.dims) {
    parts.push_back(block);
    return;
  }
  const Block::Axis& whole = block.axes[axis];
  const std::int64_t pieces = std::min(whole.extent, (bytes + limit - 1) / limit);
  for (std::int64_t i = 0; i < pieces; ++i) {
    const std::int64_t begin = whole.extent * i / pieces;
    const std::int64_t end = whole.extent * (i + 1) / pieces;
    Block part = block;
    part.axes[axis].extent = end - begin;
    part.source += begin * whole.source_stride;
    part.destination += begin * whole.destination_stride;
    split(part, axis + 1, limit, parts);
  }
}

void run_axes(const Block& block, std::size_t axis, const std::byte* source, std::byte* destination,
              Row row) {
  const Block::Axis& it = block.axes[axis];
  if (axis + 1 == block.dims) {
    row(it.extent, source, it.source_stride, destination, it.destination_stride);
    return;
  }
  for (std::int64_t i = 0; i < it.extent; ++i) {
    run_axes(block, axis + 1, source + i * it.source_stride,
             destination + i * it.destination_stride, row);
  }
}

// Elements on a side of the squares in which a transposing copy walks: their lines on both sides
// stay in the first-level cache.
constexpr std::int64_t kSquare = 64;

// Transposes one square whose source lies dense along i and whose destination lies dense along j.
// It goes through a small dense buffer, because strides that are powers of two would map the lines
// of a whole column to a few cache sets.
void transpose_square(const std::byte* source, std::byte* destination, const Block::Axis& i,
                      const Block::Axis& j, Row dense_read, Row strided_write, std::int64_t item) {
  std::array<std::byte, kSquare * kSquare * 8> buffer;
  const std::int64_t row_bytes = i.extent * item;
  for (std::int64_t row = 0; row < j.extent; ++row) {
    dense_read(i.extent, source + row * j.source_stride, item, buffer.data() + row * row_bytes,
               item);
  }
  for (std::int64_t row = 0; row < i.extent; ++row) {
    strided_write(j.extent, buffer.data() + row * item, row_bytes,
                  destination + row * i.destination_stride, j.destination_stride);
  }
}

// A block whose source is dense along axis `across` and its destination along the last one.
void run_transposed(const Block& block, std::size_t across) {
  const std::size_t last = block.dims - 1;
  const std::int64_t item = itemsize(block.source_dtype);
  const Row read = choose_row(block.source_dtype, block.source_dtype, RowKind::kDense);
  const Row write = choose_row(block.source_dtype, block.destination_dtype, RowKind::kStrided);
  std::vector<Block::Axis> outer;
  for (std::size_t d = 0; d < last; ++d) {
    if (d != across) outer.push_back(block.axes[d]);
  }
  const std::function<void(std::size_t, const std::byte*, std::byte*)> walk =
      [&](std::size_t axis, const std::byte* source, std::byte* destination) {
        if (axis < outer.size()) {
          for (std::int64_t n = 0; n < outer[axis].extent; ++n) {
            walk(axis + 1, source + n * outer[axis].source_stride,
                 destination + n * outer[axis].destination_stride);
          }
          return;
        }
        Block::Axis i = block.axes[across];
        Block::Axis j = block.axes[last];
        for (std::int64_t row = 0; row < block.axes[across].extent; row += kSquare) {
          i.extent = std::min(kSquare, block.axes[across].extent - row);
          for (std::int64_t column = 0; column < block.axes[last].extent; column += kSquare) {
            j.extent = std::min(kSquare, block.axes[last].extent - column);
            transpose_square(
                source + row * i.source_stride + column * j.source_stride,
                destination + row * i.destination_stride + column * j.destination_stride, i, j,
                read, write, item);
          }
        }
      };
  walk(0, block.source, block.destination);
}

// Rows shorter than this are not worth streaming.
constexpr std::int64_t kShortestStream = 256;

// Streaming stores win while the source is read in one sweep; where the source is read with gaps
// the processor's prefetching does better without them. Measured on an AMD EPYC, rows of 256 B - 16
// KiB: gapless source 6 -> 13 GB/s, source with gaps 8.7 -> 6.9 GB/s.
bool should_stream(const Block& block) {
  const Block::Axis& row = block.axes[block.dims - 1];
  const std::int64_t row_bytes = row.extent * itemsize(block.source_dtype);
  return row_bytes >= kShortestStream &&
         (block.dims == 1 || block.axes[block.dims - 2].source_stride == row_bytes);
}

void run(const Block& block, bool may_stream) {
  const Block::Axis& last = block.axes[block.dims - 1];
  const std::int64_t item = itemsize(block.source_dtype);
  const bool forwards = last.destination_stride == itemsize(block.destination_dtype);
  RowKind kind = RowKind::kStrided;
  if (forwards && last.source_stride == item) {
    kind = may_stream && should_stream(block) ? RowKind::kStreaming : RowKind::kDense;
  } else if (forwards) {
    for (std::size_t d = 0; d + 1 < block.dims; ++d) {
      if (block.axes[d].source_stride == item) return run_transposed(block, d);
    }
  }
  run_axes(block, 0, block.source, block.destination,
           choose_row(block.source_dtype, block.destination_dtype, kind));
}

// Small enough that the threads finish together, large enough that taking one costs nothing.
constexpr std::int64_t kSmallestShare = std::int64_t{256} << 10;
constexpr std::int64_t kLargestShare = std::int64_t{8} << 20;

// Executions that write more than this cannot leave their result in the caches anyway.
constexpr std::int64_t kStreamFrom = std::int64_t{32} << 20;

}  // namespace

void execute_native(std::span<const Block> blocks, std::span<const Blank> blanks,
                    std::size_t threads) {
  if (threads == 0) threads = hardware_threads();
  std::vector<Block> collapsed(blocks.begin(), blocks.end());
  std::int64_t total = 0;
  for (Block& block : collapsed) {
    collapse(block);
    total += bytes_of(block);
  }
  const std::int64_t share =
      std::clamp(total / static_cast<std::int64_t>(4 * threads), kSmallestShare, kLargestShare);
  std::vector<Block> parts;
  for (const Block& block : collapsed) split(block, 0, share, parts);

  // Consecutive small parts are handed out together.
  std::vector<std::size_t> batches = {0};
  std::int64_t filled = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::int64_t bytes = bytes_of(parts[i]);
    if (filled > 0 && filled + bytes > share) {
      batches.push_back(i);
      filled = 0;
    }
    filled += bytes;
  }
  batches.push_back(parts.size());
  parallel_for(batches.size() - 1, threads, [&](std::size_t batch) {
    for (std::size_t i = batches[batch]; i < batches[batch + 1]; ++i) {
      run(parts[i], total >= kStreamFrom);
    }
    finish_streaming();
  });
  parallel_for(blanks.size(), threads, [&](std::size_t i) {
    std::memset(blanks[i].destination, 0, static_cast<std::size_t>(blanks[i].nbytes));
  });
}

}  // namespace kimisys::reshard
