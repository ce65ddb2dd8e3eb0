// Groups, from their admission to the trainer's hands or to a reason why not.
#include <algorithm>

#include "rollout/machine.h"
#include "rollout/staleness.h"

namespace kimisys::rollout {

Slot Machine::free_trajectory() {
  if (free_trajectories.empty()) {
    state.trajectories.emplace_back();
    made.emplace_back();
    return static_cast<Slot>(state.trajectories.size() - 1);
  }
  const Slot slot = free_trajectories.back();
  free_trajectories.pop_back();
  return slot;
}

void Machine::admit() {
  const Slot slot = unadmitted.front();
  unadmitted.pop_front();
  Group& group = state.groups[slot];
  group.admitted = true;
  group.round = iteration;
  ++admitted;
  for (const Slot trajectory : group.trajectories) queue.push(state, predictor, trajectory);
}

std::int64_t Machine::tokens_of(const Group& group) const {
  std::int64_t tokens = 0;
  for (const Slot slot : group.trajectories) tokens += state.trajectories[slot].tokens;
  return tokens;
}

void Machine::complete(Slot slot) {
  Group& group = state.groups[slot];
  unfinished.erase({group.first_version, group.number, slot});
  if (tokens_of(group) == 0) {
    drop(slot, DropReason::kEmpty);
    return;
  }
  finished.insert({group.first_version, group.number, slot});
  complete_groups.insert({group.number, slot});
}

void Machine::grow_old(Slot slot, std::int64_t version) {
  Trajectory& trajectory = state.trajectories[slot];
  const auto older = [](std::int64_t one, std::int64_t other) {
    return one == kNoVersion ? other : std::min(one, other);
  };
  trajectory.first_version = older(trajectory.first_version, version);
  Group& group = state.groups[trajectory.group];
  const std::int64_t first = older(group.first_version, version);
  if (first == group.first_version) return;
  unfinished.erase({group.first_version, group.number, trajectory.group});
  group.first_version = first;
  unfinished.insert({first, group.number, trajectory.group});
}

bool Machine::drop_if_stale(Slot slot) {
  if (!too_stale(state, state.groups[slot].first_version)) return false;
  drop(slot, DropReason::kStale);
  return true;
}

void Machine::drop_stale() {
  for (std::set<Aging>* groups_there : {&unfinished, &finished}) {
    while (!groups_there->empty() && drop_if_stale(groups_there->begin()->slot)) {
    }
  }
}

void Machine::drop(Slot slot, DropReason reason) {
  Group& group = state.groups[slot];
  Lengths& lengths = ledger.dropped.at(static_cast<std::size_t>(reason));
  for (const Slot one : group.trajectories) {
    lengths.add(state.trajectories[one].tokens);
    if (leased(state.trajectories[one])) {
      act(ActionKind::kAbort, one);
      release(one);
    }
  }
  Action& action = act(ActionKind::kDrop);
  action.group = group.id;
  action.tokens = tokens_of(group);
  action.version = group.first_version;
  action.count = static_cast<std::int64_t>(group.trajectories.size());
  action.drop = reason;
  ++ledger.dropped_groups;
  remove(slot);
}

void Machine::hand_over(Slot slot) {
  const Group& group = state.groups[slot];
  Action& action = act(ActionKind::kHandOver);
  action.group = group.id;
  action.tokens = tokens_of(group);
  action.version = group.first_version;
  action.count = static_cast<std::int64_t>(group.trajectories.size());
  for (const Slot one : group.trajectories) {
    ledger.trained.add(state.trajectories[one].tokens);
    for (const Made& part : made[one]) {
      const auto last = static_cast<std::int64_t>(ledger.stale.size()) - 1;
      const std::int64_t versions = std::min(age(state, part.version), last);
      ledger.stale.at(static_cast<std::size_t>(versions)) += part.tokens;
    }
  }
  ++ledger.trained_groups;
  remove(slot);
}

// Its slots are free; the epochs of its trajectories stay, so that words of their leases that come
// later are known as late.
void Machine::remove(Slot slot) {
  Group& group = state.groups[slot];
  unfinished.erase({group.first_version, group.number, slot});
  finished.erase({group.first_version, group.number, slot});
  complete_groups.erase({group.number, slot});
  groups_by_id.erase(group.id);
  --groups;
  --admitted;
  trajectories -= static_cast<std::int64_t>(group.trajectories.size());
  for (const Slot one : group.trajectories) {
    Trajectory& trajectory = state.trajectories[one];
    if (trajectory.phase == Phase::kWaiting) {
      queue.erase(one);
      --waiting;
    }
    const std::uint32_t epoch = trajectory.epoch;
    trajectory = Trajectory{};
    trajectory.epoch = epoch;
    made[one].clear();
    free_trajectories.push_back(one);
  }
  group = Group{};
  free_groups.push_back(slot);
}

}  // namespace kimisys::rollout
