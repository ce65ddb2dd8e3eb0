#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "reshard/kernels.h"

namespace kimisys::reshard {
namespace {

// Copies n elements along one axis. Strides in bytes; the contiguous kernels do not look at them.
using Row = void (*)(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                     std::byte* destination, std::int64_t destination_stride);

template <std::size_t kItem>
void copy_run(std::int64_t n, const std::byte* source, std::int64_t, std::byte* destination,
              std::int64_t) {
  std::memcpy(destination, source, static_cast<std::size_t>(n) * kItem);
}

template <std::size_t kItem>
void copy_strided(std::int64_t n, const std::byte* __restrict source, std::int64_t source_stride,
                  std::byte* __restrict destination, std::int64_t destination_stride) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::memcpy(destination + i * destination_stride, source + i * source_stride, kItem);
  }
}

// memcpy of one element is how unaligned loads and stores are written; GCC vectorises these loops.
template <typename From, typename To, To (*kConvert)(From), bool kDense>
void cast_row(std::int64_t n, const std::byte* __restrict source, std::int64_t source_stride,
              std::byte* __restrict destination, std::int64_t destination_stride) {
  if constexpr (kDense) {
    source_stride = sizeof(From);
    destination_stride = sizeof(To);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    From value;
    std::memcpy(&value, source + i * source_stride, sizeof(From));
    const To converted = kConvert(value);
    std::memcpy(destination + i * destination_stride, &converted, sizeof(To));
  }
}

template <bool kDense>
Row cast_kernel(DType from) {
  if (from == DType::kFloat32) {
    return cast_row<std::uint32_t, std::uint16_t, bfloat16_bits, kDense>;
  }
  return cast_row<std::uint16_t, std::uint32_t, float32_bits, kDense>;
}

template <std::size_t kItem>
Row copy_kernel(bool dense) {
  return dense ? copy_run<kItem> : copy_strided<kItem>;
}

Row choose_row(const Block& block, bool dense) {
  if (block.source_dtype != block.destination_dtype) {
    return dense ? cast_kernel<true>(block.source_dtype) : cast_kernel<false>(block.source_dtype);
  }
  switch (itemsize(block.source_dtype)) {
    case 1:
      return copy_kernel<1>(dense);
    case 2:
      return copy_kernel<2>(dense);
    case 4:
      return copy_kernel<4>(dense);
    default:
      return copy_kernel<8>(dense);
  }
}

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

// Elements on a side of the squares in which a transposing copy walks, so that the cache lines of
// both sides are used whole before they leave the cache.
constexpr std::int64_t kSquare = 64;

// A copy whose two innermost axes are `across` (source-contiguous) and the last one.
void run_transposed(Block block, std::size_t across) {
  std::swap(block.axes[across], block.axes[block.dims - 2]);
  const Row row = choose_row(block, false);
  const Block::Axis outer = block.axes[block.dims - 2];
  const Block::Axis inner = block.axes[block.dims - 1];
  for (std::int64_t i = 0; i < outer.extent; i += kSquare) {
    for (std::int64_t j = 0; j < inner.extent; j += kSquare) {
      Block square = block;
      square.axes[block.dims - 2].extent = std::min(kSquare, outer.extent - i);
      square.axes[block.dims - 1].extent = std::min(kSquare, inner.extent - j);
      run_axes(square, 0, block.source + i * outer.source_stride + j * inner.source_stride,
               block.destination + i * outer.destination_stride + j * inner.destination_stride,
               row);
    }
  }
}

void run(const Block& block) {
  const Block::Axis& last = block.axes[block.dims - 1];
  const bool dense = last.source_stride == itemsize(block.source_dtype) &&
                     last.destination_stride == itemsize(block.destination_dtype);
  if (!dense) {
    for (std::size_t d = 0; d + 1 < block.dims; ++d) {
      if (block.axes[d].source_stride < last.source_stride) return run_transposed(block, d);
    }
  }
  run_axes(block, 0, block.source, block.destination, choose_row(block, dense));
}

// Small enough that the threads finish together, large enough that taking one costs nothing.
constexpr std::int64_t kSmallestShare = std::int64_t{256} << 10;
constexpr std::int64_t kLargestShare = std::int64_t{8} << 20;

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
    for (std::size_t i = batches[batch]; i < batches[batch + 1]; ++i) run(parts[i]);
  });
  parallel_for(blanks.size(), threads, [&](std::size_t i) {
    std::memset(blanks[i].destination, 0, static_cast<std::size_t>(blanks[i].nbytes));
  });
}

}  // namespace kimisys::reshard
