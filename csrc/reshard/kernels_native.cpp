#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "reshard/blocks.h"
#include "reshard/gaps.h"
#include "reshard/kernels.h"
#include "reshard/rows.h"
#include "reshard/stream.h"
#include "reshard/transpose.h"

namespace kimisys::reshard {
namespace {

std::int64_t bytes_of(const Block& block) {
  std::int64_t bytes = itemsize(block.destination_dtype);
  for (std::size_t d = 0; d < block.dims; ++d) bytes *= block.axes[d].extent;
  return bytes;
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

// Rows shorter than this are not worth streaming.
constexpr std::int64_t kShortestStream = 256;

// Dense along the last axis on both sides: its rows can be moved in one go.
bool has_dense_rows(const Block& block) {
  const Block::Axis& row = block.axes[block.dims - 1];
  return row.source_stride == itemsize(block.source_dtype) &&
         row.destination_stride == itemsize(block.destination_dtype);
}

std::int64_t row_bytes(const Block& block) {
  return block.axes[block.dims - 1].extent * itemsize(block.source_dtype);
}

bool worth_streaming(const Block& block, bool may_stream) {
  return may_stream && row_bytes(block) >= kShortestStream;
}

// Squares of a transpose thinner than this are mostly empty.
constexpr std::int64_t kThinnestTranspose = 16;

// Steps along the long axis of a thin transpose: what they touch stays in the caches until the
// short axis is done.
constexpr std::int64_t kThinSteps = 1024;

// The source is dense along `across`, the destination along the last axis, and one of the two is
// short. The loop runs along the long one.
void run_thin(Block block, std::size_t across, bool may_stream, const RowSet& rows) {
  const std::size_t last = block.dims - 1;
  RowKind kind = may_stream ? RowKind::kGathered : RowKind::kStrided;
  if (block.axes[across].extent > block.axes[last].extent) {
    std::swap(block.axes[across], block.axes[last]);
    kind = RowKind::kStrided;
  }
  const Row row = choose_row(block.source_dtype, block.destination_dtype, kind, rows);
  const Block::Axis along = block.axes[last];
  for (std::int64_t i = 0; i < along.extent; i += kThinSteps) {
    block.axes[last].extent = std::min(kThinSteps, along.extent - i);
    run_axes(block, 0, block.source + i * along.source_stride,
             block.destination + i * along.destination_stride, row);
  }
}

void run_alone(const Block& block, bool may_stream, const RowSet& rows) {
  const Block::Axis& last = block.axes[block.dims - 1];
  const bool stream = worth_streaming(block, may_stream);
  RowKind kind = RowKind::kStrided;
  if (has_dense_rows(block)) {
    if (stream && copy_over_gaps(block, rows)) return;
    kind = stream ? RowKind::kStreaming : RowKind::kDense;
  } else if (last.destination_stride == itemsize(block.destination_dtype)) {
    for (std::size_t d = 0; d + 1 < block.dims; ++d) {
      if (block.axes[d].source_stride != itemsize(block.source_dtype)) continue;
      if (std::min(block.axes[d].extent, last.extent) < kThinnestTranspose) {
        return run_thin(block, d, stream, rows);
      }
      return copy_transposed(block, d, may_stream, rows);
    }
    if (stream) kind = RowKind::kGathered;
  }
  run_axes(block, 0, block.source, block.destination,
           choose_row(block.source_dtype, block.destination_dtype, kind, rows));
}

// Blocks whose rows take turns in the source: one matrix read by several destinations, each a part
// of its columns. Done row by row together, so that the source is read in one sweep. Processors
// fetch ahead of a sweep; with gaps they fetch what nobody asked for, or nothing. Measured on an
// AMD EPYC, two column shards, streamed: rows of 256 B to 4 KiB 14 to 18 -> 31 GB/s.
bool can_weave(const Block& block) {
  return block.dims == 2 && has_dense_rows(block) && block.axes[0].source_stride > row_bytes(block);
}

// Whether `next` takes its turn in the rows that begin at `first`, right after `last`.
bool continues(const Block& first, const Block& last, const Block& next) {
  return can_weave(next) && next.source == last.source + row_bytes(last) &&
         next.source + row_bytes(next) <= first.source + first.axes[0].source_stride &&
         next.axes[0].extent == first.axes[0].extent &&
         next.axes[0].source_stride == first.axes[0].source_stride &&
         next.source_dtype == first.source_dtype &&
         next.destination_dtype == first.destination_dtype;
}

void run_woven(std::span<const Block> blocks, bool may_stream, const RowSet& rows) {
  for (std::int64_t i = 0; i < blocks.front().axes[0].extent; ++i) {
    for (const Block& block : blocks) {
      const auto kind = worth_streaming(block, may_stream) ? RowKind::kStreaming : RowKind::kDense;
      const Row row = choose_row(block.source_dtype, block.destination_dtype, kind, rows);
      const auto& [outer, inner] = std::pair(block.axes[0], block.axes[1]);
      row(inner.extent, block.source + i * outer.source_stride, inner.source_stride,
          block.destination + i * outer.destination_stride, inner.destination_stride);
    }
  }
}

// Small enough that the threads finish together, large enough that taking one costs nothing.
constexpr std::int64_t kSmallestShare = std::int64_t{256} << 10;
constexpr std::int64_t kLargestShare = std::int64_t{8} << 20;

// Executions that write more than this cannot leave their result in the caches anyway.
constexpr std::int64_t kStreamFrom = std::int64_t{32} << 20;

// Blocks that run together, in turn at the end of the list: blocks[i] and those after it.
std::size_t end_of_turns(const std::vector<Block>& blocks, std::size_t i) {
  std::size_t end = i + 1;
  if (!can_weave(blocks[i])) return end;
  while (end < blocks.size() && continues(blocks[i], blocks[end - 1], blocks[end])) ++end;
  return end;
}

}  // namespace

Work::Work(std::vector<Block> blocks, std::vector<Blank> blanks, std::size_t threads)
    : blocks_(std::move(blocks)),
      blanks_(std::move(blanks)),
      threads_(threads == 0 ? hardware_threads() : std::min(threads, kMaxThreads)) {
  std::int64_t total = 0;
  for (Block& block : blocks_) {
    collapse(block);
    total += bytes_of(block);
  }
  may_stream_ = total >= kStreamFrom;
  if (std::any_of(blocks_.begin(), blocks_.end(), can_weave)) {
    std::stable_sort(blocks_.begin(), blocks_.end(), [](const Block& a, const Block& b) {
      return std::less<>()(a.source, b.source);
    });
  }
  const std::int64_t share =
      std::clamp(total / static_cast<std::int64_t>(4 * threads_), kSmallestShare, kLargestShare);
  const std::size_t count = blocks_.size();  // add() appends the pieces of blocks that it cuts
  for (std::size_t i = 0; i < count;) {
    const std::size_t end = std::min(count, end_of_turns(blocks_, i));
    add(i, end - i, 0, share);
    i = end;
  }

  // Consecutive small parts are handed out together.
  std::int64_t filled = 0;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    if (filled > 0 && filled + parts_[i].bytes > share) {
      batches_.push_back(i);
      filled = 0;
    }
    filled += parts_[i].bytes;
  }
  batches_.push_back(parts_.size());
}

// Cuts the blocks, which run together, along their outermost axes into parts of at most about
// `limit` bytes.
void Work::add(std::size_t first, std::size_t count, std::size_t axis, std::int64_t limit) {
  std::int64_t bytes = 0;
  for (std::size_t b = 0; b < count; ++b) bytes += bytes_of(blocks_[first + b]);
  const std::size_t axes = count > 1 ? 1 : blocks_[first].dims;  // woven rows stay whole
  if (bytes <= limit || axis == axes) {
    parts_.push_back({first, count, bytes});
    return;
  }
  const std::int64_t extent = blocks_[first].axes[axis].extent;
  const std::int64_t pieces = std::min(extent, (bytes + limit - 1) / limit);
  for (std::int64_t i = 0; i < pieces; ++i) {
    const std::int64_t begin = extent * i / pieces;
    const std::int64_t end = extent * (i + 1) / pieces;
    const std::size_t cut = blocks_.size();
    for (std::size_t b = 0; b < count; ++b) {
      Block piece = blocks_[first + b];
      piece.axes[axis].extent = end - begin;
      piece.source += begin * piece.axes[axis].source_stride;
      piece.destination += begin * piece.axes[axis].destination_stride;
      blocks_.push_back(piece);
    }
    add(cut, count, axis + 1, limit);
  }
}

void Work::run_part(const Part& part, const RowSet& rows) const {
  if (part.count == 1) return run_alone(blocks_[part.first], may_stream_, rows);
  run_woven(std::span(blocks_).subspan(part.first, part.count), may_stream_, rows);
}

void Work::run(const RowSet& rows) const {
  parallel_for(batches_.size() - 1, threads_, [&](std::size_t batch) {
    for (std::size_t i = batches_[batch]; i < batches_[batch + 1]; ++i) run_part(parts_[i], rows);
    finish_streaming();
  });
  parallel_for(blanks_.size(), threads_, [&](std::size_t i) {
    std::memset(blanks_[i].destination, 0, static_cast<std::size_t>(blanks_[i].nbytes));
  });
}

}  // namespace kimisys::reshard
