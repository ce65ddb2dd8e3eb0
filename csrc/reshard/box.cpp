#include "reshard/box.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

namespace kimisys::reshard {
namespace {

std::int64_t end_of(const Region& box, std::size_t axis) {
  return box.offset[axis] + box.extent[axis];
}

std::size_t most_telling_axis(const std::vector<const Region*>& boxes) {
  std::size_t best_axis = 0;
  std::size_t best_count = 0;
  for (std::size_t axis = 0; axis < boxes.front()->offset.size(); ++axis) {
    std::vector<std::int64_t> offsets;
    offsets.reserve(boxes.size());
    for (const Region* box : boxes) offsets.push_back(box->offset[axis]);
    std::sort(offsets.begin(), offsets.end());
    const auto last = std::unique(offsets.begin(), offsets.end());
    const auto count = static_cast<std::size_t>(last - offsets.begin());
    if (count > best_count) std::tie(best_axis, best_count) = std::pair(axis, count);
  }
  return best_axis;
}

}  // namespace

bool overlap(const Region& a, const Region& b) {
  for (std::size_t d = 0; d < a.offset.size(); ++d) {
    if (a.offset[d] >= end_of(b, d) || b.offset[d] >= end_of(a, d)) return false;
  }
  return true;
}

bool contains(const Region& outer, const Region& inner) {
  for (std::size_t d = 0; d < outer.offset.size(); ++d) {
    if (inner.offset[d] < outer.offset[d] || end_of(inner, d) > end_of(outer, d)) return false;
  }
  return true;
}

std::optional<Region> intersect(const Region& a, const Region& b) {
  Region common;
  common.offset.resize(a.offset.size());
  common.extent.resize(a.offset.size());
  for (std::size_t d = 0; d < a.offset.size(); ++d) {
    common.offset[d] = std::max(a.offset[d], b.offset[d]);
    common.extent[d] = std::min(end_of(a, d), end_of(b, d)) - common.offset[d];
    if (common.extent[d] <= 0) return std::nullopt;
  }
  return common;
}

void subtract(const Region& box, const Region& hole, std::vector<Region>& rest) {
  // Peel a slab off each side of each axis; what is left in the end is the hole itself.
  Region core = box;
  for (std::size_t d = 0; d < box.offset.size(); ++d) {
    const std::int64_t before = hole.offset[d] - core.offset[d];
    if (before > 0) {
      Region slab = core;
      slab.extent[d] = before;
      rest.push_back(std::move(slab));
    }
    const std::int64_t after = end_of(core, d) - end_of(hole, d);
    if (after > 0) {
      Region slab = core;
      slab.offset[d] = end_of(hole, d);
      slab.extent[d] = after;
      rest.push_back(std::move(slab));
    }
    core.offset[d] = hole.offset[d];
    core.extent[d] = hole.extent[d];
  }
}

std::int64_t byte_offset_at(const Fragment& fragment, const Dims& corner) {
  std::int64_t offset = fragment.byte_offset;
  for (std::size_t d = 0; d < corner.size(); ++d) {
    offset += (corner[d] - fragment.region.offset[d]) * fragment.byte_strides[d];
  }
  return offset;
}

BoxIndex::BoxIndex(std::vector<const Region*> boxes) : boxes_(std::move(boxes)) {
  order_.resize(boxes_.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});
  max_end_.resize(boxes_.size());
  // Boxes of a 0-d tensor all overlap: there is no axis to sort on.
  if (boxes_.empty() || boxes_.front()->offset.empty()) return;
  axis_ = most_telling_axis(boxes_);
  std::stable_sort(order_.begin(), order_.end(), [this](std::size_t a, std::size_t b) {
    return boxes_[a]->offset[axis_] < boxes_[b]->offset[axis_];
  });
  build(0, order_.size());
}

std::int64_t BoxIndex::build(std::size_t low, std::size_t high) {
  if (low >= high) return 0;
  const std::size_t middle = low + (high - low) / 2;
  max_end_[middle] = std::max(
      {end_of(*boxes_[order_[middle]], axis_), build(low, middle), build(middle + 1, high)});
  return max_end_[middle];
}

void BoxIndex::collect(std::size_t low, std::size_t high, const Region& box,
                       std::vector<std::size_t>& found) const {
  if (low >= high) return;
  const std::size_t middle = low + (high - low) / 2;
  if (max_end_[middle] <= box.offset[axis_]) return;
  collect(low, middle, box, found);
  const Region& here = *boxes_[order_[middle]];
  if (here.offset[axis_] >= end_of(box, axis_)) return;
  if (overlap(here, box)) found.push_back(order_[middle]);
  collect(middle + 1, high, box, found);
}

std::vector<std::size_t> BoxIndex::overlapping(const Region& box) const {
  if (box.offset.empty()) return order_;
  std::vector<std::size_t> found;
  collect(0, order_.size(), box, found);
  return found;
}

}  // namespace kimisys::reshard
