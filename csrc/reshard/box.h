// Arithmetic on N-d boxes, and an index that finds the boxes overlapping a given one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "reshard/layout.h"

namespace kimisys::reshard {

// The common part of two boxes of the same tensor; nothing when it would be empty.
std::optional<Region> intersect(const Region& a, const Region& b);

// Do they have an element in common? Neither may be empty.
bool overlap(const Region& a, const Region& b);

// Is `inner` a part of `outer`?
bool contains(const Region& outer, const Region& inner);

// Appends to `rest` disjoint boxes that together are `box` without `hole`. `hole` must lie inside.
void subtract(const Region& box, const Region& hole, std::vector<Region>& rest);

// Bytes from the start of the fragment's buffer to the element at `corner` (tensor coordinates).
std::int64_t byte_offset_at(const Fragment& fragment, const Dims& corner);

// An interval tree over one axis, the one on which the boxes differ most: a query costs
// O(log n + boxes that overlap on that axis).
class BoxIndex {
 public:
  // The regions must be non-empty, of one tensor, and outlive the index.
  explicit BoxIndex(std::vector<const Region*> boxes);

  // Positions (in the constructor's vector) of all boxes that overlap `box`, in no useful order.
  std::vector<std::size_t> overlapping(const Region& box) const;

 private:
  std::int64_t build(std::size_t low, std::size_t high);
  void collect(std::size_t low, std::size_t high, const Region& box,
               std::vector<std::size_t>& found) const;

  std::vector<const Region*> boxes_;
  std::vector<std::size_t> order_;     // positions sorted by offset on axis_
  std::vector<std::int64_t> max_end_;  // over the subtree rooted at each place of order_
  std::size_t axis_ = 0;
};

}  // namespace kimisys::reshard
