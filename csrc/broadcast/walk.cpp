#include "broadcast/walk.h"

namespace kimisys::broadcast {

using reshard::Dims;
using reshard::kMaxDims;

namespace {

bool goes_on(const Axis& outer, const Axis& inner) {
  return outer.live_stride == inner.live_stride * inner.extent &&
         outer.snapshot_stride == inner.snapshot_stride * inner.extent &&
         outer.index_stride == inner.index_stride * inner.extent;
}

}  // namespace

Walk make_walk(const Dims& extent, const Dims& live_strides, const Dims& snapshot_strides,
               const Dims& shape, Axis fallback) {
  std::array<Axis, kMaxDims> axes{};
  std::size_t count = 0;  // innermost first
  std::int64_t index_stride = 1;
  for (std::size_t d = shape.size(); d-- > 0; index_stride *= shape[d]) {
    if (extent[d] == 1) continue;
    const Axis axis{extent[d], live_strides[d], snapshot_strides[d], index_stride};
    if (count > 0 && goes_on(axis, axes[count - 1])) {
      axes[count - 1].extent *= axis.extent;
    } else {
      axes[count++] = axis;
    }
  }
  Walk walk;
  walk.run = count > 0 ? axes[0] : fallback;
  for (std::size_t i = count; i-- > 1;) {
    walk.outer[walk.outer_count++] = axes[i];
    walk.runs *= axes[i].extent;
  }
  return walk;
}

std::int64_t flat_index(const Dims& at, const Dims& shape) {
  std::int64_t index = 0;
  for (std::size_t d = 0; d < shape.size(); ++d) index = index * shape[d] + at[d];
  return index;
}

std::int64_t distance(const Dims& from, const Dims& to, const Dims& strides) {
  std::int64_t bytes = 0;
  for (std::size_t d = 0; d < from.size(); ++d) bytes += (to[d] - from[d]) * strides[d];
  return bytes;
}

}  // namespace kimisys::broadcast
