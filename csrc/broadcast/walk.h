// Walking over a region of a fragment and its twin at once: runs along one axis, and where each of
// them begins.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "broadcast/mix.h"
#include "reshard/dims.h"

namespace kimisys::broadcast {

struct Axis {
  std::int64_t extent = 1;
  std::int64_t live_stride = 0;      // bytes
  std::int64_t snapshot_stride = 0;  // bytes
  std::int64_t index_stride = 0;     // elements of the whole tensor
};

// Where the elements of a region lie on both sides: runs along the last axis, which the outer ones
// enumerate in row-major order.
struct Walk {
  std::array<Axis, reshard::kMaxDims> outer{};
  std::size_t outer_count = 0;
  Axis run;
  std::int64_t runs = 1;
};

// The walk over a region of this extent. Axes of extent 1 are dropped, neighbours merged where
// nothing lies between them on any side. A region of one element is a run along `fallback`.
Walk make_walk(const reshard::Dims& extent, const reshard::Dims& live_strides,
               const reshard::Dims& snapshot_strides, const reshard::Dims& shape, Axis fallback);

// Steps through the runs of a walk: how far the current one is from the first.
class Odometer {
 public:
  explicit Odometer(const Walk& walk) : walk_(walk) {}

  std::int64_t live() const { return live_; }          // bytes
  std::int64_t snapshot() const { return snapshot_; }  // bytes
  std::int64_t index() const { return index_; }        // elements of the tensor

  void next() {
    for (std::size_t d = walk_.outer_count; d-- > 0;) {
      const Axis& axis = walk_.outer[d];
      move(axis, 1);
      if (++at_[d] < axis.extent) return;
      move(axis, -axis.extent);
      at_[d] = 0;
    }
  }

 private:
  void move(const Axis& axis, std::int64_t steps) {
    live_ += steps * axis.live_stride;
    snapshot_ += steps * axis.snapshot_stride;
    index_ += steps * axis.index_stride;
  }

  const Walk& walk_;
  std::array<std::int64_t, reshard::kMaxDims> at_{};
  std::int64_t live_ = 0;
  std::int64_t snapshot_ = 0;
  std::int64_t index_ = 0;
};

// The row-major number of the element `at` in a tensor of this shape.
std::int64_t flat_index(const reshard::Dims& at, const reshard::Dims& shape);

// Bytes from the element `from` to the element `to` in memory of these strides.
std::int64_t distance(const reshard::Dims& from, const reshard::Dims& to,
                      const reshard::Dims& strides);

// The digest's counter (see mix.h) of the element with that flat index.
inline std::uint64_t counter_of(std::uint64_t key, std::int64_t index) {
  return key + static_cast<std::uint64_t>(index) * kGolden;
}

}  // namespace kimisys::broadcast
