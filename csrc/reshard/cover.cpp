// Layout::cover: each element once, whatever is replicated or overlaps.
#include <algorithm>
#include <tuple>
#include <utility>

#include "reshard/box.h"
#include "reshard/layout.h"

namespace kimisys::reshard {
namespace {

// What is left of `region` after everything in `earlier` has taken its part.
std::vector<Region> remainder(const Region& region, const std::vector<const Region*>& earlier) {
  std::vector<Region> left = {region};
  for (const Region* taken : earlier) {
    std::vector<Region> next;
    for (const Region& piece : left) {
      if (const auto common = intersect(piece, *taken)) {
        subtract(piece, *common, next);
      } else {
        next.push_back(piece);
      }
    }
    left = std::move(next);
    if (left.empty()) break;
  }
  return left;
}

}  // namespace

Layout Layout::cover() const {
  std::vector<Fragment> kept;
  for (std::vector<std::size_t>& group : fragments_by_tensor(*this)) {
    if (group.empty()) continue;
    std::stable_sort(group.begin(), group.end(), [this](std::size_t a, std::size_t b) {
      return fragment_buffer_[a] < fragment_buffer_[b];  // buffers_ is sorted by (rank, name)
    });
    std::vector<const Region*> regions;
    for (const std::size_t i : group) regions.push_back(&fragments_[i].region);
    const BoxIndex index(regions);
    for (std::size_t turn = 0; turn < group.size(); ++turn) {
      std::vector<std::size_t> found = index.overlapping(*regions[turn]);
      std::erase_if(found, [turn](std::size_t other) { return other >= turn; });
      std::sort(found.begin(), found.end());
      std::vector<const Region*> earlier;
      for (const std::size_t other : found) earlier.push_back(regions[other]);
      const Fragment& fragment = fragments_[group[turn]];
      for (Region& piece : remainder(fragment.region, earlier)) {
        Fragment trimmed = fragment;
        trimmed.byte_offset = byte_offset_at(fragment, piece.offset);
        trimmed.region = std::move(piece);
        kept.push_back(std::move(trimmed));
      }
    }
  }
  return {tensors_, buffers_, std::move(kept), {}, places_};
}

}  // namespace kimisys::reshard
