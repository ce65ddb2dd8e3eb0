// When leases die unless they are heard of. A heap with one entry per lease that is not touched
// when the lease is heard of, only when its old deadline comes up: words of leases cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rollout/state.h"

namespace kimisys::rollout {

class Deadlines {
 public:
  // A lease began. Its deadline only ever moves to later.
  void add(const State& state, Slot trajectory);

  // The next deadline; kNever: no lease lives. O(1) amortised, O(log leases) at worst per entry
  // that has moved since.
  std::int64_t next(const State& state);

  // A lease whose deadline has come by state.now, and forgets it; kNoSlot: there is none.
  Slot expired(const State& state);

  // The deadline of a live lease: lease_timeout after its last word, or after it was asked to
  // pause, which words do not put off.
  static std::int64_t of(const State& state, const Trajectory& trajectory);

 private:
  struct Entry {
    std::int64_t deadline;
    Slot slot;
    std::uint32_t epoch;
  };
  static bool later(const Entry& left, const Entry& right);
  static bool live(const State& state, const Entry& entry);

  std::vector<Entry> heap_;
  std::size_t full_ = 64;  // entries at which those of dead leases are taken out
};

}  // namespace kimisys::rollout
