// Small tables for the tests of policies: engines, groups, and trajectories put where a test wants
// them, with the sums that the scheduler would keep.
#pragma once

#include <cstdint>
#include <vector>

#include "rollout/state.h"

namespace kimisys::rollout {

struct PolicyWorld {
  State state;

  EngineId engine(std::int64_t kv_capacity = 1 << 20, std::int64_t max_sequences = 256) {
    Engine added;
    added.id = static_cast<EngineId>(state.engines.size());
    added.phase = EnginePhase::kServing;
    added.version = state.version;
    added.kv_capacity = kv_capacity;
    added.max_sequences = max_sequences;
    state.engines.push_back(added);
    return added.id;
  }

  // A group with `samples` trajectories that wait and have not begun.
  Slot group(std::uint32_t samples = 1, std::int64_t prompt_tokens = 100,
             std::int64_t limit = 32768) {
    const auto slot = static_cast<Slot>(state.groups.size());
    Group added;
    added.id = 1000 + slot;
    added.number = slot;
    added.prompt_tokens = prompt_tokens;
    added.used = true;
    for (std::uint32_t sample = 0; sample < samples; ++sample) {
      Trajectory trajectory;
      trajectory.group = slot;
      trajectory.sample = sample;
      trajectory.limit = limit;
      trajectory.phase = Phase::kWaiting;
      added.trajectories.push_back(static_cast<Slot>(state.trajectories.size()));
      state.trajectories.push_back(trajectory);
    }
    state.groups.push_back(added);
    return slot;
  }

  Slot sample(Slot group, std::uint32_t sample) const {
    return state.groups[group].trajectories[sample];
  }

  void run(Slot trajectory, EngineId on, std::int64_t tokens = 0) {
    Trajectory& running = state.trajectories[trajectory];
    running.tokens = tokens;
    running.phase = Phase::kRunning;
    running.engine = on;
    state.groups[running.group].admitted = true;
    Engine& engine = state.engines[on];
    engine.leases.push_back(trajectory);
    engine.sequences += 1;
    engine.kv_tokens += state.context(trajectory);
  }

  // Of one that does not run.
  void finish(Slot trajectory, std::int64_t tokens, EndReason reason = EndReason::kStop) {
    Trajectory& finished = state.trajectories[trajectory];
    finished.tokens = tokens;
    finished.phase = Phase::kFinished;
    finished.ended = reason;
    state.groups[finished.group].finished += 1;
  }
};

// A generator of its own: the same numbers with every standard library.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  std::int64_t below(std::int64_t end) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(end));
  }
  double normal() {  // the sum of twelve uniforms
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  std::uint64_t state_;
};

}  // namespace kimisys::rollout
