// Leases: one attempt at a segment each, from its start to its end or death.
#include <algorithm>

#include "rollout/budget.h"
#include "rollout/machine.h"

namespace kimisys::rollout {

Action& Machine::act(ActionKind kind) {
  Action& action = out->emplace_back();
  action.kind = kind;
  return action;
}

Action& Machine::act(ActionKind kind, Slot slot) {
  const Trajectory& trajectory = state.trajectories[slot];
  Action& action = act(kind);
  action.engine = trajectory.engine;
  action.lease = make_lease(slot, trajectory.epoch);
  action.group = state.group_of(slot).id;
  action.sample = trajectory.sample;
  action.tokens = trajectory.tokens;
  return action;
}

void Machine::lease(Slot slot, std::uint32_t place) {
  Trajectory& trajectory = state.trajectories[slot];
  Engine& engine = state.engines[place];
  queue.erase(slot);
  --waiting;
  ++running;
  const std::int64_t context = state.context(slot);
  if (trajectory.engine != kNoEngine) {
    ++ledger.continued;
    ledger.moved += trajectory.engine != engine.id ? 1 : 0;
    ledger.recomputed += context;
  }
  ++ledger.segments;
  ++trajectory.epoch;
  trajectory.segment_start = trajectory.tokens;
  trajectory.segment_limit = segment_limit(state, trajectory, spent);
  trajectory.since = trajectory.heard = state.now;
  trajectory.engine = engine.id;
  trajectory.engine_place = place;
  trajectory.lease_place = static_cast<std::uint32_t>(engine.leases.size());
  trajectory.phase = Phase::kRunning;
  engine.leases.push_back(slot);
  ++engine.sequences;
  engine.kv_tokens += context;
  deadlines.add(state, slot);

  Action& action = act(trajectory.tokens == 0 ? ActionKind::kStart : ActionKind::kContinue, slot);
  action.limit = trajectory.segment_limit;
  action.deadline = Deadlines::of(state, trajectory);
  action.version = engine.version;
}

void Machine::pause(Slot slot) {
  Trajectory& trajectory = state.trajectories[slot];
  if (trajectory.phase != Phase::kRunning) return;
  trajectory.phase = Phase::kPausing;
  ++state.engines[trajectory.engine_place].pausing;
  trajectory.since = state.now;
  act(ActionKind::kPause, slot).deadline = Deadlines::of(state, trajectory);
}

void Machine::arrive(Slot slot, std::int64_t tokens) {
  Trajectory& trajectory = state.trajectories[slot];
  trajectory.heard = state.now;
  if (tokens == 0) return;
  Engine& engine = state.engines[trajectory.engine_place];
  if (trajectory.tokens == trajectory.segment_start) grow_old(slot, engine.version);
  trajectory.tokens += tokens;
  trajectory.failures = 0;
  engine.kv_tokens += tokens;
  // Heard of now; the next report says what else there is.
  engine.kv_unheard = std::max<std::int64_t>(0, engine.kv_unheard - tokens);
  spent += tokens;
}

void Machine::release(Slot slot) {
  Trajectory& trajectory = state.trajectories[slot];
  Engine& engine = state.engines[trajectory.engine_place];
  const Slot last = engine.leases.back();
  engine.leases[trajectory.lease_place] = last;
  state.trajectories[last].lease_place = trajectory.lease_place;
  engine.leases.pop_back();
  --engine.sequences;
  if (trajectory.phase == Phase::kPausing) --engine.pausing;
  engine.kv_tokens -= state.context(slot);
  --running;
  trajectory.phase = Phase::kFree;

  const std::int64_t tokens = trajectory.tokens - trajectory.segment_start;
  std::vector<Made>& versions = made[slot];
  if (tokens > 0) {
    if (versions.empty() || versions.back().version != engine.version) {
      versions.push_back({engine.version, 0});
    }
    versions.back().tokens += tokens;
  }
  if (engine.leases.empty()) {
    engine.kv_unheard = 0;
    idle(engine);
  }
}

void Machine::wait(Slot slot) {
  Trajectory& trajectory = state.trajectories[slot];
  if (trajectory.tokens == trajectory.limit) {
    finish(slot, EndReason::kLength);
    return;
  }
  trajectory.phase = Phase::kWaiting;
  trajectory.since = state.now;
  ++waiting;
  queue.push(state, predictor, slot);
}

void Machine::requeue(Slot slot) {
  act(ActionKind::kRequeue, slot);
  ++ledger.requeued;
  release(slot);
  wait(slot);
}

void Machine::finish(Slot slot, EndReason reason) {
  Trajectory& trajectory = state.trajectories[slot];
  trajectory.phase = Phase::kFinished;
  trajectory.since = state.now;
  trajectory.ended = reason;
  ledger.finished.add(trajectory.tokens);
  ledger.ended.at(static_cast<std::size_t>(reason)).add(trajectory.tokens);
  predictor.finished(state, slot);
  Group& group = state.groups[trajectory.group];
  if (++group.finished == group.trajectories.size()) {
    complete(trajectory.group);
  } else {
    queue.reorder(state, predictor, trajectory.group);
  }
}

}  // namespace kimisys::rollout
