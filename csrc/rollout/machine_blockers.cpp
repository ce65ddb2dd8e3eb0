// Who blocks this step, and since when.
#include <algorithm>
#include <optional>

#include "rollout/machine.h"

namespace kimisys::rollout {
namespace {

Blocker lease_blocker(const State& state, BlockerKind kind, Slot slot, std::int64_t since) {
  const Trajectory& trajectory = state.trajectories[slot];
  Blocker blocker{kind, since};
  blocker.group = state.group_of(slot).id;
  blocker.sample = trajectory.sample;
  blocker.tokens = trajectory.tokens;
  if (leased(trajectory)) {
    blocker.engine = trajectory.engine;
    blocker.lease = make_lease(slot, trajectory.epoch);
  }
  return blocker;
}

// The earliest of each phase, one entry a kind.
void add_trajectories(const State& state, std::vector<Blocker>& blockers) {
  std::optional<Blocker> pausing;
  std::optional<Blocker> running;
  std::optional<Blocker> waiting;
  const auto earliest = [&](std::optional<Blocker>& best, BlockerKind kind, Slot slot,
                            std::int64_t since) {
    if (!best || since < best->since) best = lease_blocker(state, kind, slot, since);
  };
  for (Slot slot = 0; slot < state.trajectories.size(); ++slot) {
    const Trajectory& trajectory = state.trajectories[slot];
    if (trajectory.phase == Phase::kPausing) {
      earliest(pausing, BlockerKind::kPausing, slot, trajectory.since);
    } else if (trajectory.phase == Phase::kRunning) {
      earliest(running, BlockerKind::kRunning, slot, trajectory.heard);
    } else if (trajectory.phase == Phase::kWaiting && state.group_of(slot).admitted) {
      earliest(waiting, BlockerKind::kWaiting, slot, trajectory.since);
    }
  }
  for (const auto& blocker : {pausing, running, waiting}) {
    if (blocker) blockers.push_back(*blocker);
  }
}

void add_engines(const State& state, std::int64_t turn, std::vector<Blocker>& blockers) {
  std::optional<Blocker> updating;
  bool serving = false;
  std::int64_t lost = turn;
  for (const Engine& engine : state.engines) {
    serving = serving || engine.phase == EnginePhase::kServing;
    if (engine.phase == EnginePhase::kUpdating) {
      if (!updating || engine.since < updating->since) {
        updating = Blocker{BlockerKind::kUpdate, engine.since, engine.id};
      }
    } else if (engine.phase != EnginePhase::kServing) {
      lost = std::max(lost, engine.since);
    }
  }
  if (updating) {
    blockers.push_back(*updating);
  } else if (!serving) {
    blockers.push_back({BlockerKind::kEngines, lost});
  }
}

}  // namespace

std::vector<Blocker> Machine::blockers() const {
  std::vector<Blocker> result;
  if (!ready) {
    result.push_back({BlockerKind::kTrainer, turn});
    return result;
  }
  add_engines(state, turn, result);
  if (!closing && wanted > 0 && queue.size() == 0 && unadmitted.empty()) {
    result.push_back({BlockerKind::kPrompts, wanted_since});
  }
  add_trajectories(state, result);
  return result;
}

Counts Machine::counts() const {
  Counts counts;
  counts.groups = groups;
  counts.complete = static_cast<std::int64_t>(complete_groups.size());
  counts.trajectories = trajectories;
  counts.waiting = waiting;
  counts.running = running;
  counts.engines = active;
  counts.iteration = iteration;
  counts.spent = spent;
  return counts;
}

}  // namespace kimisys::rollout
