// The blocks that the diff walks over together.
#pragma once

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

}  // namespace kimisys::broadcast
