// The model's own account of events; what it checks of actions is in scheduler_promises.cpp.
#include "rollout/scheduler_model.h"

#include <algorithm>

namespace kimisys::rollout::test {

bool ModelGroup::complete() const {
  return std::all_of(samples.begin(), samples.end(), [](const auto& one) { return one.finished; });
}

std::int64_t ModelGroup::tokens() const {
  std::int64_t tokens = 0;
  for (const ModelSample& one : samples) tokens += one.tokens;
  return tokens;
}

std::int64_t ModelGroup::first_version() const {
  std::int64_t first = kNoVersion;
  for (const ModelSample& one : samples) {
    if (one.first_version == kNoVersion) continue;
    first = first == kNoVersion ? one.first_version : std::min(first, one.first_version);
  }
  return first;
}

ModelSample& Model::sample(GroupId group, std::uint32_t number) {
  return groups_.at(group).samples.at(number);
}

std::int64_t Model::deadline(const ModelLease& lease) const {
  return lease.asked_to_pause.value_or(lease.heard) + config_.lease_timeout;
}

bool Model::has_leases(EngineId engine) const {
  return std::any_of(leases_.begin(), leases_.end(),
                     [&](const auto& entry) { return entry.second.engine == engine; });
}

std::int64_t Model::complete() const {
  return std::count_if(groups_.begin(), groups_.end(),
                       [](const auto& entry) { return entry.second.complete(); });
}

bool Model::reached() const {
  if (config_.token_budget == 0) return complete() >= config_.groups;
  return spent_ >= config_.token_budget && complete() >= 1;
}

bool Model::waits() const {
  if (config_.max_staleness < 0 || config_.staleness == Staleness::kDrop) return false;
  return std::any_of(groups_.begin(), groups_.end(), [&](const auto& entry) {
    const std::int64_t first = entry.second.first_version();
    return !entry.second.complete() && first != kNoVersion &&
           newest_ - first >= config_.max_staleness;
  });
}

void Model::observe(const Event& event, std::span<const Action> actions,
                    const Scheduler& scheduler) {
  now_ = event.time;
  const bool offers_waited = offers_wait_;
  expired_.clear();
  lost_.clear();
  drops_.clear();
  failed_.clear();
  handed_.clear();
  handed_tokens_ = 0;
  started_now_ = 0;
  late_ = false;
  apply(event);
  offers_wait_ = event.kind == EventKind::kOffered && debt_ > 0;
  expect_drops();
  if (late_ && !offers_waited && !actions.empty())
    throw std::runtime_error("a late event caused actions");
  for (const Action& action : actions) act(action);
  after(scheduler);
}

void Model::apply(const Event& event) {
  switch (event.kind) {
    case EventKind::kOffered: {
      ModelGroup group;
      group.number = offered_++;
      group.limit = event.limit;
      group.samples.resize(static_cast<std::size_t>(event.count));
      groups_[event.id] = group;
      debt_ = std::max<std::int64_t>(0, debt_ - 1);
      break;
    }
    case EventKind::kTokens:
    case EventKind::kSegmentEnded:
      apply_lease(event);
      break;
    case EventKind::kTime:
      for (const auto& [lease, entry] : leases_) {
        if (deadline(entry) <= now_) expired_[lease] = entry;
      }
      break;
    case EventKind::kTrainerReady:
      ready_ = true;
      debt_ = 0;
      break;
    default:
      apply_engine(event);
  }
}

void Model::apply_engine(const Event& event) {
  ModelEngine& engine = engines_[event.engine];
  if (event.kind == EventKind::kEngineJoined) {
    engine = {true, false, event.version, std::nullopt, event.count};
    if (newest_ == kNoVersion) newest_ = event.version;
  } else if (event.kind == EventKind::kEngineLeft) {
    engine.leaving = true;
    engine.asked.reset();
    engine.there = has_leases(event.engine);
  } else if (event.kind == EventKind::kEngineFailed) {
    engine.there = false;
    engine.asked.reset();
    for (auto entry = leases_.begin(); entry != leases_.end();) {
      const auto here = entry++;
      if (here->second.engine != event.engine) continue;
      lost_.insert(*here);
      unlease(here->first);
    }
  } else if (event.kind == EventKind::kEngineUpdated) {
    late_ = !engine.there || engine.leaving || !engine.asked;
    if (late_) return;
    engine.version = event.version;
    engine.asked.reset();
  } else if (event.kind == EventKind::kVersionPublished) {
    engines_.erase(kNoEngine);
    newest_ = event.version;
  }
}

void Model::apply_lease(const Event& event) {
  const auto found = leases_.find(event.id);
  late_ = found == leases_.end();
  if (late_) return;
  ModelLease& lease = found->second;
  const GroupId group = lease.group;
  ModelSample& one = sample(group, lease.sample);
  arrive(lease, event.tokens);
  if (event.kind == EventKind::kTokens) return;
  const bool final = event.reason == EndReason::kStop || event.reason == EndReason::kRepetition;
  if (final) {
    one.finished = true;
  } else if (event.reason == EndReason::kFailed) {
    if (one.tokens < groups_[group].limit && ++one.failures >= config_.max_failures) {
      failed_.insert(group);
    }
  } else {
    one.failures = 0;
  }
  unlease(event.id);
}

void Model::arrive(ModelLease& lease, std::int64_t tokens) {
  lease.heard = now_;
  if (tokens == 0) return;
  ModelSample& one = sample(lease.group, lease.sample);
  const std::int64_t version = engines_.at(lease.engine).version;
  one.first_version =
      one.first_version == kNoVersion ? version : std::min(one.first_version, version);
  one.tokens += tokens;
  one.failures = 0;
  lease.made += tokens;
  spent_ += tokens;
}

void Model::unlease(Lease lease) {
  const ModelLease entry = leases_.at(lease);
  leases_.erase(lease);
  ModelSample& one = sample(entry.group, entry.sample);
  one.lease.reset();
  if (one.tokens == groups_.at(entry.group).limit) one.finished = true;
  ModelEngine& engine = engines_.at(entry.engine);
  if (engine.leaving && !has_leases(entry.engine)) engine.there = false;
}

// Each group that must be dropped in this event, with the reasons that hold.
void Model::expect_drops() {
  for (const auto& [id, group] : groups_) {
    const std::int64_t first = group.first_version();
    if (config_.max_staleness >= 0 && first != kNoVersion &&
        newest_ - first > config_.max_staleness) {
      drops_[id].insert(DropReason::kStale);
    }
    if (failed_.contains(id)) drops_[id].insert(DropReason::kFailures);
    if (group.complete() && group.tokens() == 0) drops_[id].insert(DropReason::kEmpty);
  }
}

}  // namespace kimisys::rollout::test
