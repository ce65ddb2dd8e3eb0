// Events as they come in: what no correct caller sends is refused before anything has changed.
#include "base/error.h"
#include "rollout/concurrency.h"
#include "rollout/digest.h"
#include "rollout/machine.h"
#include "rollout/placement.h"

namespace kimisys::rollout {
namespace {

constexpr auto kCode = ErrorCode::kScheduler;
// Bounds of one number in an event. Sums over all that can be live, and over years of events, stay
// within 64 bits.
constexpr std::int64_t kMostTokens = std::int64_t{1} << 31;
constexpr std::int64_t kMostSamples = std::int64_t{1} << 16;
constexpr std::int64_t kLastTime = std::int64_t{1} << 61;

}  // namespace

Machine::Machine(const Config& config) { state.config = config; }

void Machine::handle(const Event& event, std::vector<Action>& actions) {
  KIMISYS_CHECK(event.time >= state.now && event.time <= kLastTime, kCode, "event ",
                name(event.kind), ": its time is ", event.time, " us after one of ", state.now,
                " us; send events in the order of a clock that does not go back");
  const std::int64_t before = state.now;
  state.now = event.time;
  out = &actions;
  const std::size_t first = actions.size();
  bool changed = false;
  try {
    changed = take(event);
  } catch (...) {
    state.now = before;
    throw;
  }
  if (event.kind == EventKind::kOffered && wanted > 0) {
    // The order of the policy has more to choose from once the others that were asked for are here.
    unsettled = true;
  } else if (changed || unsettled) {
    unsettled = false;
    settle();
  }
  digest = chain(digest, event);
  for (std::size_t i = first; i < actions.size(); ++i) digest = chain(digest, actions[i]);
}

bool Machine::take(const Event& event) {
  switch (event.kind) {
    case EventKind::kTokens:
      return tokens(event);
    case EventKind::kSegmentEnded:
      return segment_ended(event);
    case EventKind::kTime:
      return time_passed();
    case EventKind::kOffered:
      return offered(event);
    case EventKind::kEngineJoined:
      return joined(event);
    case EventKind::kEngineLeft:
      return left(event);
    case EventKind::kEngineFailed:
      return failed(event);
    case EventKind::kEngineUpdated:
      return updated(event);
    case EventKind::kVersionPublished:
      return published(event);
    case EventKind::kTrainerReady:
      return trainer_ready();
    case EventKind::kEngineStats:
      return reported(event);
  }
  fail(kCode, "event of kind ", static_cast<std::uint32_t>(event.kind),
       ": there is no such kind; is it from a trace of another version?");
}

bool Machine::offered(const Event& event) {
  const auto about = [&] { return "offered group " + std::to_string(event.id); };
  KIMISYS_CHECK(!groups_by_id.contains(event.id), kCode, about(),
                ": it was offered before and is not handed over yet; give each prompt its own id");
  KIMISYS_CHECK(event.count >= 1 && event.count <= kMostSamples, kCode, about(), ": ", event.count,
                " samples; ask for 1 to ", kMostSamples);
  KIMISYS_CHECK(event.tokens >= 0 && event.tokens <= kMostTokens, kCode, about(), ": a prompt of ",
                event.tokens, " tokens; it must be from 0 to ", kMostTokens);
  KIMISYS_CHECK(event.limit >= 1 && event.limit <= kMostTokens, kCode, about(), ": a limit of ",
                event.limit, " output tokens; allow 1 to ", kMostTokens);
  const auto samples = static_cast<std::size_t>(event.count);
  KIMISYS_CHECK(free_trajectories.size() + (kNoSlot - state.trajectories.size()) >= samples, kCode,
                about(), ": ", state.trajectories.size(),
                " trajectories are there already; hand some over first");

  Slot slot = static_cast<Slot>(state.groups.size());
  if (free_groups.empty()) {
    state.groups.emplace_back();
  } else {
    slot = free_groups.back();
    free_groups.pop_back();
  }
  Group& group = state.groups[slot];
  group.id = event.id;
  group.number = next_number++;
  group.prompt_tokens = event.tokens;
  group.offered = state.now;
  group.used = true;
  group.trajectories.reserve(samples);
  for (std::uint32_t sample = 0; sample < event.count; ++sample) {
    const Slot one = free_trajectory();
    Trajectory& trajectory = state.trajectories[one];
    trajectory.limit = event.limit;
    trajectory.since = state.now;
    trajectory.group = slot;
    trajectory.sample = sample;
    trajectory.phase = Phase::kWaiting;
    group.trajectories.push_back(one);
  }
  groups_by_id.emplace(event.id, slot);
  unadmitted.push_back(slot);
  ++groups;
  trajectories += event.count;
  waiting += event.count;
  if (wanted > 0) --wanted;
  ++ledger.offered_groups;
  return true;
}

Slot Machine::live(const Event& event) const {
  const Slot slot = slot_of(event.id);
  const std::uint32_t epoch = epoch_of(event.id);
  KIMISYS_CHECK(
      slot < state.trajectories.size() && epoch >= 1 && epoch <= state.trajectories[slot].epoch,
      kCode, "event ", name(event.kind), ": lease ", event.id,
      " was never given; take leases from the actions of this scheduler");
  const Trajectory& trajectory = state.trajectories[slot];
  return epoch == trajectory.epoch && leased(trajectory) ? slot : kNoSlot;
}

void Machine::check_tokens(const Event& event, Slot slot) const {
  KIMISYS_CHECK(event.tokens >= 0, kCode, "event ", name(event.kind), ": lease ", event.id,
                " made ", event.tokens, " tokens; count those that are new since the last event");
  if (slot == kNoSlot) return;
  const Trajectory& trajectory = state.trajectories[slot];
  const std::int64_t so_far = trajectory.tokens - trajectory.segment_start;
  KIMISYS_CHECK(event.tokens <= trajectory.segment_limit - so_far, kCode, "event ",
                name(event.kind), ": lease ", event.id, " of group ", state.group_of(slot).id,
                " sample ", trajectory.sample, " made ", event.tokens, " tokens after ", so_far,
                ", more than its limit of ", trajectory.segment_limit,
                "; stop it there, and count only new tokens");
}

bool Machine::tokens(const Event& event) {
  const Slot slot = live(event);
  check_tokens(event, slot);
  if (slot == kNoSlot) {
    ++ledger.late;
    return false;
  }
  const Trajectory& trajectory = state.trajectories[slot];
  const std::int64_t first_version = trajectory.first_version;
  const std::int64_t spent_before = spent;
  arrive(slot, event.tokens);
  const bool older = trajectory.first_version != first_version;
  if (older && drop_if_stale(trajectory.group)) return true;
  for (const Slot victim : overflow(state, predictor, state.engines[trajectory.engine_place])) {
    pause(victim);
  }
  if (yields(state, predictor, slot, queue.front())) pause(slot);
  // Words of leases close an iteration when they reach its budget, and open it again when one that
  // was asked to pause has begun a group that it must not end without.
  const std::int64_t budget = state.config.token_budget;
  return (spent_before < budget && spent >= budget) || (closing && older);
}

bool Machine::segment_ended(const Event& event) {
  const Slot slot = live(event);
  check_tokens(event, slot);
  const EndReason reason = event.reason;
  KIMISYS_CHECK(reason != EndReason::kNone && reason <= EndReason::kFailed, kCode,
                "event segment_ended: lease ", event.id, " ended for reason ",
                static_cast<std::uint32_t>(reason),
                "; say stop, length, paused, repetition or failed");
  if (slot == kNoSlot) {
    ++ledger.late;
    return false;
  }
  Trajectory& trajectory = state.trajectories[slot];
  const std::int64_t total = trajectory.tokens - trajectory.segment_start + event.tokens;
  KIMISYS_CHECK(reason != EndReason::kLength || total == trajectory.segment_limit, kCode,
                "event segment_ended: lease ", event.id, " of group ", state.group_of(slot).id,
                " sample ", trajectory.sample, " ended by length after ", total, " of ",
                trajectory.segment_limit, " tokens; an engine that cannot hold more has failed it");
  const Slot group = trajectory.group;
  arrive(slot, event.tokens);
  release(slot);
  if (reason == EndReason::kStop || reason == EndReason::kRepetition) {
    finish(slot, reason);
  } else if (reason != EndReason::kFailed) {
    trajectory.failures = 0;
    wait(slot);
  } else if (trajectory.tokens < trajectory.limit &&
             ++trajectory.failures >= state.config.max_failures) {
    drop(group, DropReason::kFailures);
  } else {
    wait(slot);
  }
  if (state.groups[group].used) drop_if_stale(group);
  return true;
}

bool Machine::time_passed() {
  bool any = false;
  for (Slot slot = deadlines.expired(state); slot != kNoSlot; slot = deadlines.expired(state)) {
    act(ActionKind::kAbort, slot);
    requeue(slot);
    any = true;
  }
  return any;
}

bool Machine::trainer_ready() {
  KIMISYS_CHECK(!ready, kCode, "event trainer_ready: the trainer has been ready since ", turn,
                " us and has no batch yet; send it once per batch");
  ready = true;
  trains = false;
  turn = state.now;
  wanted = 0;
  return true;
}

}  // namespace kimisys::rollout
