// The blocks that the diff walks over together.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "broadcast/diff.h"
#include "broadcast/walk.h"

namespace kimisys::broadcast {

// The blocks of a band: alike but for where they begin.
struct Diff::Band {
  struct Member {
    std::size_t block = 0;
    const std::byte* live = nullptr;
    std::byte* snapshot = nullptr;
    std::int64_t index = 0;  // of its first element in the tensor
  };

  const Pair* pair = nullptr;
  Walk walk;
  std::int64_t elements = 0;  // of each block
  std::vector<Member> members;
  bool dense = false;

  Run run(const Member& member, const Odometer& at) const {
    return {member.live + at.live(), member.snapshot + at.snapshot(), walk.run.extent,
            walk.run.live_stride, walk.run.snapshot_stride};
  }
};

inline std::size_t width_of(DType dtype) {
  return static_cast<std::size_t>(std::countr_zero(static_cast<unsigned>(itemsize(dtype))));
}

// The parts of a region that the digests count.
std::vector<reshard::Region> counted_parts(const reshard::Region& region,
                                           const std::vector<reshard::Region>& counted);

inline bool is_whole(const reshard::Region& region, const std::vector<reshard::Region>& parts) {
  return parts.size() == 1 && parts[0] == region;
}

}  // namespace kimisys::broadcast
