// Every invariant, from scratch: what is derived against what it is derived from.
#include <algorithm>

#include "base/error.h"
#include "rollout/machine.h"
#include "rollout/staleness.h"

namespace kimisys::rollout {
namespace {

template <typename... Parts>
void hold(bool condition, const Parts&... parts) {
  KIMISYS_CHECK(condition, ErrorCode::kScheduler, "audit: ", parts...,
                "; this is a defect of the scheduler, please report it with the trace");
}

struct Totals {
  std::int64_t waiting = 0;
  std::int64_t running = 0;
  std::int64_t queued = 0;
  std::int64_t begun = 0;
};

void audit_trajectory(const Machine& machine, Slot slot, Totals& totals) {
  const Trajectory& trajectory = machine.state.trajectories[slot];
  const Group& group = machine.state.group_of(slot);
  hold(trajectory.tokens >= 0 && trajectory.tokens <= trajectory.limit, "trajectory ", slot,
       " has ", trajectory.tokens, " tokens of ", trajectory.limit);
  hold(trajectory.phase != Phase::kFree, "trajectory ", slot, " of a group is in no phase");
  hold(trajectory.phase != Phase::kWaiting || trajectory.tokens < trajectory.limit, "trajectory ",
       slot, " waits for nothing");
  hold((trajectory.first_version == kNoVersion) == (trajectory.tokens == 0), "trajectory ", slot,
       " has tokens of no version");
  std::int64_t in_segments = 0;
  for (const Made& part : machine.made[slot]) {
    in_segments += part.tokens;
    hold(part.version >= trajectory.first_version, "trajectory ", slot, " has older tokens");
  }
  if (trajectory.phase == Phase::kWaiting) {
    ++totals.waiting;
    totals.queued += group.admitted ? 1 : 0;
    totals.begun += group.admitted && trajectory.tokens > 0 ? 1 : 0;
  }
  if (!leased(trajectory)) {
    hold(in_segments == trajectory.tokens, "trajectory ", slot, " lost tokens");
    return;
  }
  ++totals.running;
  const std::int64_t so_far = trajectory.tokens - trajectory.segment_start;
  hold(group.admitted, "trajectory ", slot, " is leased before its group is admitted");
  hold(so_far >= 0 && so_far <= trajectory.segment_limit && trajectory.segment_limit >= 1,
       "lease of trajectory ", slot, " made ", so_far, " of ", trajectory.segment_limit);
  hold(in_segments == trajectory.segment_start, "trajectory ", slot, " lost tokens");
  const Engine& engine = machine.state.engines.at(trajectory.engine_place);
  hold(engine.id == trajectory.engine && engine.phase != EnginePhase::kGone &&
           engine.leases.at(trajectory.lease_place) == slot,
       "trajectory ", slot, " is not where its lease says");
  hold(engine.phase != EnginePhase::kLeaving || trajectory.phase == Phase::kPausing, "trajectory ",
       slot, " goes on on an engine that leaves");
}

void audit_group(const Machine& machine, Slot slot, Totals& totals) {
  const Group& group = machine.state.groups[slot];
  std::int64_t first = kNoVersion;
  std::uint32_t finished = 0;
  for (std::uint32_t sample = 0; sample < group.trajectories.size(); ++sample) {
    const Trajectory& trajectory = machine.state.trajectories.at(group.trajectories[sample]);
    hold(trajectory.group == slot && trajectory.sample == sample, "group ", group.id,
         " does not hold its sample ", sample);
    audit_trajectory(machine, group.trajectories[sample], totals);
    if (trajectory.phase == Phase::kFinished) ++finished;
    if (trajectory.first_version != kNoVersion) {
      first = first == kNoVersion ? trajectory.first_version
                                  : std::min(first, trajectory.first_version);
    }
  }
  const bool complete = finished == group.trajectories.size();
  const Aging aging{group.first_version, group.number, slot};
  hold(group.finished == finished && group.first_version == first, "group ", group.id,
       " counts wrong");
  hold(machine.groups_by_id.at(group.id) == slot, "group ", group.id, " is not found by its id");
  hold(!too_stale(machine.state, first), "group ", group.id, " is older than the bound");
  hold(machine.finished.contains(aging) == complete, "group ", group.id, " is complete or not");
  hold(machine.complete_groups.contains({group.number, slot}) == complete, "group ", group.id,
       " is complete or not");
  hold(machine.unfinished.contains(aging) == (!complete && first != kNoVersion), "group ", group.id,
       " has tokens or not");
  hold(!complete || machine.tokens_of(group) > 0, "group ", group.id, " is complete and empty");
}

void audit_engines(const Machine& machine) {
  std::int64_t active = 0;
  std::int64_t leases = 0;
  for (const Engine& engine : machine.state.engines) {
    std::int64_t context = 0;
    std::int64_t pausing = 0;
    for (const Slot slot : engine.leases) {
      context += machine.state.context(slot);
      pausing += machine.state.trajectories[slot].phase == Phase::kPausing ? 1 : 0;
    }
    const bool serves =
        engine.phase == EnginePhase::kServing || engine.phase == EnginePhase::kUpdating;
    active += serves ? 1 : 0;
    leases += engine.sequences;
    hold(engine.sequences == static_cast<std::int64_t>(engine.leases.size()) &&
             engine.kv_tokens == context && engine.pausing == pausing,
         "engine ", engine.id, " counts its leases wrong");
    hold(serves || engine.asked == kNoVersion, "engine ", engine.id,
         " takes a version and is gone");
    hold(engine.phase != EnginePhase::kServing || engine.version == machine.state.version,
         "engine ", engine.id, " serves version ", engine.version, " after ",
         machine.state.version);
    hold(engine.phase != EnginePhase::kUpdating || !engine.leases.empty() ||
             engine.asked != kNoVersion || machine.state.version == kNoVersion,
         "engine ", engine.id, " is idle and was not asked to take its version");
    hold(engine.asked == kNoVersion || engine.leases.empty(), "engine ", engine.id,
         " runs while it takes a version");
    hold(engine.phase != EnginePhase::kGone || engine.leases.empty(), "engine ", engine.id,
         " is gone and holds leases");
    hold(engine.phase != EnginePhase::kLeaving || !engine.leases.empty(), "engine ", engine.id,
         " has nothing left to leave for");
  }
  hold(active == machine.active, machine.active, " engines are counted, ", active, " serve");
  hold(leases == machine.running, machine.running, " leases are counted, engines hold ", leases);
}

}  // namespace

void Machine::audit() const {
  Totals totals;
  std::int64_t used = 0;
  std::int64_t held = 0;
  std::int64_t admitted_groups = 0;
  for (Slot slot = 0; slot < state.groups.size(); ++slot) {
    if (!state.groups[slot].used) continue;
    audit_group(*this, slot, totals);
    ++used;
    held += static_cast<std::int64_t>(state.groups[slot].trajectories.size());
    admitted_groups += state.groups[slot].admitted ? 1 : 0;
  }
  audit_engines(*this);
  hold(used == groups && groups_by_id.size() == static_cast<std::size_t>(used), "groups lost");
  hold(admitted_groups == admitted &&
           static_cast<std::int64_t>(unadmitted.size()) == used - admitted,
       "groups wait for admission that have it");
  hold(held == trajectories &&
           free_trajectories.size() == state.trajectories.size() - static_cast<std::size_t>(held),
       "trajectories lost");
  hold(finished.size() == complete_groups.size() &&
           finished.size() + unfinished.size() <= static_cast<std::size_t>(used),
       "groups are kept that are gone");
  hold(totals.waiting == waiting && totals.running == running, "trajectories counted wrong");
  hold(queue.size() == static_cast<std::size_t>(totals.queued) &&
           queue.begun() == static_cast<std::size_t>(totals.begun),
       "the queue holds ", queue.size(), " trajectories, of which ", queue.begun(), " have begun; ",
       totals.queued, " wait, of which ", totals.begun, " have begun");
  hold(!closing || (ready && running > 0), "an iteration is closing that is not open");
  hold(ledger.offered_groups == groups + ledger.trained_groups + ledger.dropped_groups,
       ledger.offered_groups, " groups were offered, ", groups, " are there, ",
       ledger.trained_groups, " trained, ", ledger.dropped_groups, " dropped");
}

}  // namespace kimisys::rollout
