#include "broadcast/blocks.h"

#include <algorithm>

#include "base/dtype.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Region;

constexpr std::int64_t kMaxParts = 16;
constexpr std::int64_t kMinPart = 512;  // elements: a shorter row costs more calls than it saves
constexpr std::int64_t kLineBytes = 64;

// Into how many equal parts the last dimension is cut.
std::int64_t parts_of(const Region& region, std::int64_t itemsize) {
  if (region.extent.size() < 2) return 1;
  const std::int64_t extent = region.extent.back();
  for (std::int64_t parts = kMaxParts; parts > 1; parts /= 2) {
    const std::int64_t part = extent / parts;
    // A part larger than a block is cut anyway, at multiples of a power of two.
    if (extent % parts == 0 && part >= kMinPart && part <= kMaxBlockElements &&
        part * itemsize % kLineBytes == 0) {
      return parts;
    }
  }
  return 1;
}

}  // namespace

Blocks::Blocks(const reshard::Layout& rank_layout) {
  for (std::size_t i = 0; i < rank_layout.fragments().size(); ++i) {
    const Region& region = rank_layout.fragments()[i].region;
    if (region.empty()) continue;
    cut(i, region, itemsize(rank_layout.tensors()[rank_layout.tensor_of(i)].dtype));
  }
  if (chunk_begins_.back() != blocks_.size()) chunk_begins_.push_back(blocks_.size());
}

void Blocks::cut(std::size_t fragment, const Region& region, std::int64_t itemsize) {
  const std::size_t dims = region.extent.size();
  const std::int64_t parts = parts_of(region, itemsize);
  Dims step = region.extent;
  std::int64_t elements = 1;
  for (std::size_t d = dims; d-- > 0; elements *= step[d]) {
    if (d + 1 == dims) step[d] /= parts;
    step[d] = std::clamp<std::int64_t>(kMaxBlockElements / elements, 1, step[d]);
  }
  Dims at(dims, 0);
  for (bool more = true; more;) {
    for (std::int64_t part = 0; part < parts; ++part) {
      Block block{fragment, {Dims(dims), Dims(dims)}};
      for (std::size_t d = 0; d < dims; ++d) {
        block.region.offset[d] = region.offset[d] + at[d];
        block.region.extent[d] = std::min(step[d], region.extent[d] - at[d]);
      }
      if (dims > 0) at[dims - 1] += step[dims - 1];
      blocks_.push_back(block);
    }
    band_begins_.push_back(blocks_.size());
    if (blocks_.size() - chunk_begins_.back() >= kChunkBlocks) {
      chunk_begins_.push_back(blocks_.size());
    }
    // The last dimension has moved on already; carry over to the outer ones.
    more = false;
    for (std::size_t d = dims; d-- > 0;) {
      if (d + 1 < dims) at[d] += step[d];
      if (at[d] < region.extent[d]) {
        more = true;
        break;
      }
      at[d] = 0;
    }
  }
}

}  // namespace kimisys::broadcast
