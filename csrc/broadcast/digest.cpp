#include "broadcast/digest.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "base/thread_pool.h"
#include "broadcast/digest_kernels.h"
#include "broadcast/mix.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Fragment;
using reshard::kMaxDims;
using reshard::Layout;
using reshard::Memories;
using reshard::Tensor;

constexpr std::string_view kNaive = "naive";

// Elements that one task of the thread pool sums: long enough to hide the dispatch, short enough
// to balance.
constexpr std::int64_t kTile = 1 << 17;

struct Axis {
  std::int64_t extent = 1;
  std::int64_t index_stride = 0;  // elements of the whole tensor
  std::int64_t byte_stride = 0;
};

// A fragment as a set of equal runs: `run` is the innermost loop, `outer` enumerates the runs.
struct Walk {
  const std::byte* data = nullptr;
  std::uint64_t counter = 0;  // of the region's first element
  std::size_t tensor = 0;
  std::size_t width = 0;  // bytes of an element
  Axis run;
  std::array<Axis, kMaxDims> outer{};
  std::size_t outer_count = 0;
  std::int64_t runs = 1;
};

// A rectangle of a walk: runs [first, last), of each the elements [begin, end).
struct Tile {
  std::size_t walk = 0;
  std::int64_t first = 0;
  std::int64_t last = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Axes of one fragment without those of extent 1, neighbours merged where index and bytes both go
// on without a seam. Row-major order, so the last axis has the smallest index stride.
std::vector<Axis> merged_axes(const Tensor& tensor, const Fragment& fragment) {
  std::vector<Axis> axes;
  std::int64_t index_stride = 1;
  for (std::size_t d = tensor.shape.size(); d-- > 0; index_stride *= tensor.shape[d]) {
    const std::int64_t extent = fragment.region.extent[d];
    const std::int64_t byte_stride = fragment.byte_strides[d];
    if (extent == 1) continue;
    if (!axes.empty() && index_stride == axes.back().index_stride * axes.back().extent &&
        byte_stride == axes.back().byte_stride * axes.back().extent) {
      axes.back().extent *= extent;
    } else {
      axes.push_back({extent, index_stride, byte_stride});
    }
  }
  std::reverse(axes.begin(), axes.end());
  return axes;
}

std::uint64_t first_counter(const Tensor& tensor, const Fragment& fragment) {
  std::uint64_t index = 0;
  for (std::size_t d = 0; d < tensor.shape.size(); ++d) {
    index = index * static_cast<std::uint64_t>(tensor.shape[d]) +
            static_cast<std::uint64_t>(fragment.region.offset[d]);
  }
  return tensor_key(tensor.name) + index * kGolden;
}

Walk make_walk(const Layout& layout, std::size_t index, const std::byte* memory) {
  const Fragment& fragment = layout.fragments()[index];
  const Tensor& tensor = layout.tensors()[layout.tensor_of(index)];
  Walk walk;
  walk.data = memory + fragment.byte_offset;
  walk.counter = first_counter(tensor, fragment);
  walk.tensor = layout.tensor_of(index);
  walk.width = static_cast<std::size_t>(itemsize(tensor.dtype));
  walk.run.byte_stride = itemsize(tensor.dtype);
  std::vector<Axis> axes = merged_axes(tensor, fragment);
  if (axes.empty()) return walk;
  // The run follows the bytes where they are dense: any index stride costs the same, but a gather
  // does not vectorise.
  auto run = std::find_if(axes.rbegin(), axes.rend(), [&](const Axis& axis) {
    return axis.byte_stride == itemsize(tensor.dtype);
  });
  if (run == axes.rend()) run = axes.rbegin();
  walk.run = *run;
  axes.erase(std::next(run).base());
  walk.outer_count = axes.size();
  std::copy(axes.begin(), axes.end(), walk.outer.begin());
  for (const Axis& axis : axes) walk.runs *= axis.extent;
  return walk;
}

// Counters step mod 2^64.
std::uint64_t advance(std::int64_t position, std::int64_t index_stride) {
  return static_cast<std::uint64_t>(position) * static_cast<std::uint64_t>(index_stride) * kGolden;
}

std::uint64_t sum_tile(const Walk& walk, const Tile& tile, RunSum sum_run) {
  std::array<std::int64_t, kMaxDims> position{};
  std::int64_t rest = tile.first;
  for (std::size_t d = walk.outer_count; d-- > 0; rest /= walk.outer[d].extent) {
    position[d] = rest % walk.outer[d].extent;
  }
  std::uint64_t sum = 0;
  for (std::int64_t row = tile.first; row < tile.last; ++row) {
    const std::byte* data = walk.data + tile.begin * walk.run.byte_stride;
    std::uint64_t counter = walk.counter + advance(tile.begin, walk.run.index_stride);
    for (std::size_t d = 0; d < walk.outer_count; ++d) {
      data += position[d] * walk.outer[d].byte_stride;
      counter += advance(position[d], walk.outer[d].index_stride);
    }
    sum += sum_run(data, tile.end - tile.begin, walk.run.byte_stride, counter,
                   advance(1, walk.run.index_stride));
    for (std::size_t d = walk.outer_count; d-- > 0;) {
      if (++position[d] < walk.outer[d].extent) break;
      position[d] = 0;
    }
  }
  return sum;
}

std::vector<Tile> make_tiles(const std::vector<Walk>& walks) {
  std::vector<Tile> tiles;
  for (std::size_t w = 0; w < walks.size(); ++w) {
    const std::int64_t length = walks[w].run.extent;
    const std::int64_t rows = std::max<std::int64_t>(1, kTile / length);
    for (std::int64_t row = 0; row < walks[w].runs; row += rows) {
      const std::int64_t last = std::min(row + rows, walks[w].runs);
      for (std::int64_t begin = 0; begin < length; begin += kTile) {
        tiles.push_back({w, row, last, begin, std::min(begin + kTile, length)});
      }
    }
  }
  return tiles;
}

// Zero-extended, on the little-endian machines that this library knows.
std::uint64_t load_bits(const std::byte* data, std::size_t width) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, data, width);
  return bits;
}

// The definition, spelled out: no merging, no tiles, no vectors.
std::uint64_t sum_naive(const Tensor& tensor, const Fragment& fragment, const std::byte* memory) {
  const auto width = static_cast<std::size_t>(itemsize(tensor.dtype));
  Dims position(tensor.shape.size(), 0);
  std::uint64_t sum = 0;
  for (std::int64_t left = fragment.region.elements(); left > 0; --left) {
    std::uint64_t index = 0;
    std::int64_t offset = fragment.byte_offset;
    for (std::size_t d = 0; d < position.size(); ++d) {
      index = index * static_cast<std::uint64_t>(tensor.shape[d]) +
              static_cast<std::uint64_t>(fragment.region.offset[d] + position[d]);
      offset += position[d] * fragment.byte_strides[d];
    }
    sum += mix(tensor_key(tensor.name) + index * kGolden, fold(load_bits(memory + offset, width)));
    for (std::size_t d = position.size(); d-- > 0;) {
      if (++position[d] < fragment.region.extent[d]) break;
      position[d] = 0;
    }
  }
  return sum;
}

// The buffers that the fragments use, in the order of layout.buffers(); null for the others.
std::vector<const std::byte*> find_memory(const Layout& layout, const Memories& memory) {
  std::vector<const std::byte*> found(layout.buffers().size(), nullptr);
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    const std::size_t b = layout.buffer_of(i);
    if (found[b] != nullptr) continue;
    const reshard::Buffer& buffer = layout.buffers()[b];
    KIMISYS_CHECK(b < memory.size() && memory[b].has_value(), ErrorCode::kBufferMismatch,
                  "digest needs buffer '", buffer.name, "' of rank ", buffer.rank, " for tensor '",
                  layout.fragments()[i].tensor, "'; pass it under (", buffer.rank, ", '",
                  buffer.name, "')");
    KIMISYS_CHECK(memory[b]->nbytes == buffer.nbytes, ErrorCode::kBufferMismatch,
                  "digest needs buffer '", buffer.name, "' of rank ", buffer.rank, " with ",
                  buffer.nbytes, " bytes, got ", memory[b]->nbytes,
                  "; pass the buffer that the layout describes");
    found[b] = memory[b]->data;
  }
  return found;
}

std::string_view chosen_implementation(std::string_view asked) {
  if (asked.empty()) {
    const char* forced = std::getenv("KIMISYS_BROADCAST_IMPLEMENTATION");
    asked = forced != nullptr ? forced : "";
  }
  if (asked.empty()) return digest_kernels().front().name;
  std::string known;
  for (const std::string_view name : digest_implementations()) {
    if (name == asked) return name;
    known.append(known.empty() ? "" : ", ").append(name);
  }
  fail(ErrorCode::kLayout, "unknown digest implementation '", asked, "'; this machine has ", known);
}

}  // namespace

std::vector<std::string_view> digest_implementations() {
  std::vector<std::string_view> names;
  for (const DigestKernel& kernel : digest_kernels()) names.emplace_back(kernel.name);
  names.push_back(kNaive);
  return names;
}

std::vector<std::uint64_t> digest(const Layout& layout, const Memories& memory, std::size_t threads,
                                  std::string_view implementation) {
  const std::string_view chosen = chosen_implementation(implementation);
  const std::vector<const std::byte*> found = find_memory(layout, memory);
  std::vector<std::uint64_t> digests(layout.tensors().size(), 0);

  if (chosen == kNaive) {
    for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
      const std::size_t tensor = layout.tensor_of(i);
      digests[tensor] +=
          sum_naive(layout.tensors()[tensor], layout.fragments()[i], found[layout.buffer_of(i)]);
    }
    return digests;
  }

  std::vector<Walk> walks;
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    if (layout.fragments()[i].region.empty()) continue;
    walks.push_back(make_walk(layout, i, found[layout.buffer_of(i)]));
  }
  const DigestKernel& kernel =
      *std::find_if(digest_kernels().begin(), digest_kernels().end(),
                    [&](const DigestKernel& candidate) { return candidate.name == chosen; });
  const std::vector<Tile> tiles = make_tiles(walks);
  std::vector<std::uint64_t> sums(tiles.size());
  parallel_for(tiles.size(), threads, [&](std::size_t t) {
    const Walk& walk = walks[tiles[t].walk];
    const auto width = static_cast<std::size_t>(std::countr_zero(walk.width));
    sums[t] = sum_tile(walk, tiles[t], kernel.by_width[width]);
  });
  for (std::size_t t = 0; t < tiles.size(); ++t) digests[walks[tiles[t].walk].tensor] += sums[t];
  return digests;
}

}  // namespace kimisys::broadcast
