// What has become possible after an event: the iteration's end, new groups, new leases.
#include <algorithm>

#include "base/error.h"
#include "rollout/budget.h"
#include "rollout/machine.h"
#include "rollout/over_issue.h"
#include "rollout/placement.h"
#include "rollout/staleness.h"

namespace kimisys::rollout {

void Machine::settle() {
  close();
  if (!open()) return;
  start();
  want();
}

bool Machine::open() const {
  if (closing) return false;
  return ready || state.config.deployment == Deployment::kOverlap;
}

bool Machine::reached() const {
  const auto complete = static_cast<std::int64_t>(complete_groups.size());
  if (state.config.token_budget == 0) return complete >= state.config.groups;
  if (complete == 0) return false;
  // Admission may hold back what would be needed to spend the budget.
  return budget_reached(state.config, spent) ||
         (admitted == complete && admitted >= admitted_most());
}

bool Machine::waits_for_stale() const {
  return waits(state.config) && !unfinished.empty() &&
         last_chance(state, unfinished.begin()->first_version);
}

void Machine::close() {
  const bool done = ready && reached() && !waits_for_stale();
  if (done && state.config.deployment == Deployment::kAlternate && running > 0) {
    if (!closing) {
      for (const Engine& engine : state.engines) pause_all(engine);
    }
    closing = true;
    return;
  }
  // Done, or what was complete has been dropped since: the iteration goes on.
  closing = false;
  if (done) hand_over_batch();
}

void Machine::hand_over_batch() {
  const std::int64_t most = state.config.groups > 0 ? state.config.groups : kNever;
  std::set<std::pair<std::uint64_t, Slot>> batch;
  const auto full = [&] { return static_cast<std::int64_t>(batch.size()) >= most; };
  for (const Aging& aging : finished) {
    if (full() || !last_chance(state, aging.first_version)) break;
    batch.insert({aging.number, aging.slot});
  }
  for (const auto& group : complete_groups) {
    if (full()) break;
    batch.insert(group);
  }
  std::int64_t tokens = 0;
  for (const auto& group : batch) {
    hand_over(group.second);
    tokens += out->back().tokens;
  }
  Action& action = act(ActionKind::kBatch);
  action.count = static_cast<std::int64_t>(batch.size());
  action.tokens = tokens;
  action.version = state.version;
  ready = false;
  trains = true;
  turn = state.now;
  ++iteration;
  spent = 0;
}

std::int64_t Machine::admitted_most() const {
  return std::min(issue_limit(state.config), admission_limit(state.config, trains));
}

// Once an iteration has all that it needs but waits for groups that began, others would only make
// it wait longer.
bool Machine::may_begin() const {
  if (unadmitted.empty() || admitted >= admitted_most()) return false;
  const auto complete = static_cast<std::int64_t>(complete_groups.size());
  const bool waits_for_begun = ready && budget_reached(state.config, spent) && admitted > complete;
  return !waits_for_begun;
}

bool Machine::admit_next() {
  // As many as engines at once, so that the order of the policy has something to choose from.
  const std::int64_t most = std::max<std::int64_t>(1, active);
  std::int64_t count = 0;
  for (; count < most && may_begin(); ++count) admit();
  return count > 0;
}

void Machine::start() {
  if (state.config.token_budget == 0) {
    while (may_begin()) admit();
  }
  const std::int64_t most = state.config.live_limit > 0 ? state.config.live_limit : kNever;
  for (;;) {
    const Slot slot = queue.front();
    if (slot == kNoSlot) {
      if (active == 0 || !admit_next()) break;
      continue;
    }
    const bool begins = state.trajectories[slot].tokens == 0;
    if (begins && running + static_cast<std::int64_t>(queue.begun()) >= most) break;
    const EngineId engine = place(state, predictor, slot);
    if (engine == kNoEngine) break;
    lease(slot, engines_by_id.at(engine));
  }
  if (queue.size() == 0) {
    for (const Slot slot : moves(state, predictor)) pause(slot);
  }
}

void Machine::want() {
  if (wanted > 0) return;
  const auto ahead = static_cast<std::int64_t>(unadmitted.size());
  std::int64_t missing = 0;
  if (state.config.token_budget == 0) {
    missing = std::min<std::int64_t>(admitted_most(), 1 << 20) - admitted - ahead;
  } else if (ahead < active) {
    missing = 2 * active - ahead;
  }
  if (missing <= 0) return;
  wanted = missing;
  wanted_since = state.now;
  act(ActionKind::kWant).count = missing;
}

}  // namespace kimisys::rollout
