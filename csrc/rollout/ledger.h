// The bias ledger: lengths dispatched against lengths trained, and why the others were dropped. A
// trainer that loses long trajectories teaches short answers; this shows it.
#pragma once

#include <array>
#include <cstdint>

#include "rollout/types.h"

namespace kimisys::rollout {

// Trajectories by output length: bucket b counts lengths of 2^(b-1) to 2^b - 1, bucket 0 length 0.
struct Lengths {
  std::array<std::int64_t, 33> count = {};
  std::int64_t trajectories = 0;
  std::int64_t tokens = 0;

  void add(std::int64_t tokens_of_one);
};

struct Ledger {
  Lengths finished;                // trajectories that ended, whatever became of their group
  Lengths trained;                 // of groups handed over
  std::array<Lengths, 4> dropped;  // by DropReason; lengths when dropped
  std::array<Lengths, 6> ended;    // trajectories that ended, by EndReason
  std::array<std::int64_t, 65> stale = {};  // trained tokens by staleness in versions; last: more
  std::int64_t offered_groups = 0;
  std::int64_t trained_groups = 0;
  std::int64_t dropped_groups = 0;
  std::int64_t segments = 0;
  std::int64_t continued = 0;   // segments that were not their trajectory's first
  std::int64_t moved = 0;       // of those, on another engine than the one before
  std::int64_t recomputed = 0;  // tokens of prompts and outputs whose KV was computed again for it
  std::int64_t requeued = 0;    // leases that died: deadline, failure, engine lost
  std::int64_t late = 0;        // events of dead leases, ignored
};

}  // namespace kimisys::rollout
