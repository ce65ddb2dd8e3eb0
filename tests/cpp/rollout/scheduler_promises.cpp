// What the model demands of each action, and of the scheduler after each event.
#include <algorithm>

#include "rollout/scheduler_model.h"

namespace kimisys::rollout::test {
namespace {

void promise(bool kept, const std::string& what) {
  if (!kept) throw std::runtime_error("broken: " + what);
}

}  // namespace

void Model::act(const Action& action) {
  switch (action.kind) {
    case ActionKind::kStart:
    case ActionKind::kContinue:
      started(action);
      break;
    case ActionKind::kPause: {
      promise(leases_.contains(action.lease), "only a live lease is asked to pause");
      ModelLease& lease = leases_.at(action.lease);
      promise(!lease.asked_to_pause, "a lease is asked to pause once");
      lease.asked_to_pause = now_;
      break;
    }
    case ActionKind::kAbort:
    case ActionKind::kRequeue:
      ended(action);
      break;
    case ActionKind::kHandOver:
      handed_over(action);
      break;
    case ActionKind::kBatch:
      batch(action);
      break;
    case ActionKind::kDrop:
      dropped(action);
      break;
    case ActionKind::kUpdate: {
      ModelEngine& engine = engines_.at(action.engine);
      promise(engine.there && !engine.leaving, "only an engine that stays takes a version");
      promise(!has_leases(action.engine), "an engine takes a version when it is idle");
      promise(!engine.asked, "an engine is asked to take a version once");
      promise(action.version == newest_ && engine.version < newest_, "engines take the newest");
      engine.asked = action.version;
      break;
    }
    case ActionKind::kWant:
      promise(debt_ == 0 && action.count > 0, "prompts are asked for once");
      debt_ = action.count;
      break;
  }
}

void Model::started(const Action& action) {
  ++started_now_;
  promise(given_.insert(action.lease).second, "no lease is given twice");
  promise(groups_.contains(action.group), "only groups that are there are started");
  ModelGroup& group = groups_.at(action.group);
  ModelSample& one = group.samples.at(action.sample);
  promise(!one.lease, "no trajectory on two engines");
  promise(!one.finished, "what is finished does not go on");
  promise(action.tokens == one.tokens, "tokens that had arrived are kept");
  promise((action.kind == ActionKind::kStart) == (one.tokens == 0), "what has begun is continued");
  promise(action.limit >= 1 && one.tokens + action.limit <= group.limit, "limits are kept");
  promise(config_.segment_tokens == 0 || action.limit <= config_.segment_tokens, "segments end");
  const ModelEngine& engine = engines_.at(action.engine);
  promise(engine.there && !engine.leaving && !engine.asked, "only engines that serve get work");
  promise(engine.version == newest_ && action.version == newest_, "engines serve the newest");
  promise(ready_ || config_.deployment == Deployment::kOverlap,
          "nothing starts between a batch and the trainer's next");
  promise(action.deadline == now_ + config_.lease_timeout, "every lease has a deadline");
  one.lease = action.lease;
  group.begun = true;
  leases_[action.lease] = {action.group, action.sample, action.engine, 0,
                           action.limit, now_,          std::nullopt};
  const auto there = std::count_if(leases_.begin(), leases_.end(), [&](const auto& entry) {
    return entry.second.engine == action.engine;
  });
  promise(there <= engine.sequences, "no engine gets more sequences than it takes");
}

void Model::ended(const Action& action) {
  if (action.kind == ActionKind::kRequeue) {
    promise(lost_.contains(action.lease), "only a lease that died is requeued");
    const ModelLease lease = lost_.at(action.lease);
    lost_.erase(action.lease);
    promise(action.tokens == sample(lease.group, lease.sample).tokens, "a requeue loses nothing");
    return;
  }
  promise(leases_.contains(action.lease), "only a live lease is aborted");
  const ModelLease lease = leases_.at(action.lease);
  const bool expired = expired_.erase(action.lease) > 0;
  promise(expired || drops_.contains(lease.group), "a lease is aborted for a reason");
  if (expired) lost_[action.lease] = lease;
  unlease(action.lease);
  // What had no token at its deadline and no sibling left may be complete and empty now.
  if (expired) expect_drops();
}

void Model::dropped(const Action& action) {
  promise(groups_.contains(action.group), "only groups that are there are dropped");
  promise(drops_.contains(action.group) && drops_.at(action.group).contains(action.drop),
          "a group is dropped for a reason that holds");
  const ModelGroup& group = groups_.at(action.group);
  for (const ModelSample& one : group.samples) {
    promise(!one.lease, "what is dropped does not run");
  }
  promise(action.tokens == group.tokens(), "a drop says what is lost");
  drops_.erase(action.group);
  groups_.erase(action.group);
}

void Model::handed_over(const Action& action) {
  promise(ready_, "the trainer gets what it asked for");
  promise(groups_.contains(action.group), "each prompt is handed over once");
  const ModelGroup& group = groups_.at(action.group);
  promise(group.complete(), "what is handed over is complete");
  if (handed_.empty()) {
    // By count the trainer takes what there is when nothing more may begin.
    const bool held = config_.staleness == Staleness::kAdmission && config_.token_budget > 0 &&
                      std::all_of(groups_.begin(), groups_.end(), [](const auto& entry) {
                        return !entry.second.begun || entry.second.complete();
                      });
    promise(reached() || held, "an iteration ends when it has what it is for");
    promise(!waits(), "an iteration waits for what would grow too stale");
    promise(config_.deployment == Deployment::kOverlap || leases_.empty(),
            "nothing runs when engines and trainer change turns");
  }
  promise(action.tokens == group.tokens(), "the tokens that were made are handed over");
  promise(action.version == group.first_version(), "a group's oldest version is told");
  promise(config_.max_staleness < 0 || newest_ - action.version <= config_.max_staleness,
          "nothing stale is handed over");
  handed_.push_back(group.number);
  handed_tokens_ += action.tokens;
  groups_.erase(action.group);
}

void Model::batch(const Action& action) {
  const auto count = static_cast<std::int64_t>(handed_.size());
  promise(count >= 1 && action.count == count, "a batch counts its groups");
  promise(action.tokens == handed_tokens_, "a batch counts its tokens");
  promise(std::is_sorted(handed_.begin(), handed_.end()), "groups come in the order of offers");
  if (config_.token_budget == 0) promise(count == config_.groups, "a whole batch is whole");
  if (config_.groups > 0) promise(count <= config_.groups, "a batch is no larger than asked");
  if (config_.token_budget > 0 && bound_) {
    promise(spent_ <= *bound_, "a budget is exceeded by no more than was in flight");
    if (spent_ > config_.token_budget) ++overshoots_;
  }
  bound_.reset();
  ready_ = false;
  spent_ = 0;
  ++batches_;
}

void Model::after(const Scheduler& scheduler) {
  promise(expired_.empty(), "a lease dies at its deadline");
  promise(lost_.empty(), "what a dead lease leaves is requeued");
  promise(drops_.empty(), "what cannot be trained is dropped");
  for (const auto& entry : leases_) {
    promise(groups_.contains(entry.second.group), "what is gone does not run");
  }
  std::int64_t next = kNever;
  for (const auto& entry : leases_) next = std::min(next, deadline(entry.second));
  if (offers_wait_) next = now_;
  promise(scheduler.next_deadline() == next, "the next deadline is known");
  check_counts(scheduler.counts());
  check_bound();
  check_idle();
}

void Model::check_counts(const Counts& counts) const {
  std::int64_t trajectories = 0;
  std::int64_t waiting = 0;
  for (const auto& entry : groups_) {
    trajectories += static_cast<std::int64_t>(entry.second.samples.size());
    for (const ModelSample& one : entry.second.samples) waiting += !one.lease && !one.finished;
  }
  promise(counts.groups == static_cast<std::int64_t>(groups_.size()), "groups are counted");
  promise(counts.trajectories == trajectories, "trajectories are counted");
  promise(counts.waiting == waiting, "what waits is counted");
  promise(counts.running == static_cast<std::int64_t>(leases_.size()), "what runs is counted");
  promise(counts.complete == complete(), "what is complete is counted");
  promise(counts.spent == spent_, "what is spent is counted");
  promise(counts.iteration == batches_, "batches are counted");
}

// The exact bound on a budget: when it is reached and nothing is waited for, at most
// token_budget - 1 and the tokens of that event are spent; from there on nothing starts, and each
// lease in flight can make no more than its own limit leaves.
void Model::check_bound() {
  if (!done()) {
    bound_.reset();
    return;
  }
  promise(config_.deployment == Deployment::kAlternate && !leases_.empty(),
          "an iteration that has what it is for ends");
  promise(started_now_ == 0, "nothing starts when an iteration has what it is for");
  std::int64_t left = 0;
  for (const auto& entry : leases_) {
    promise(entry.second.asked_to_pause.has_value(), "what runs at the end is paused");
    left += entry.second.limit - entry.second.made;
  }
  if (!bound_) bound_ = spent_ + left;
}

void Model::check_idle() const {
  if (done() || (!ready_ && config_.deployment == Deployment::kAlternate)) return;
  const bool waiting = std::any_of(groups_.begin(), groups_.end(), [&](const auto& entry) {
    const ModelGroup& group = entry.second;
    return group.begun &&
           std::any_of(group.samples.begin(), group.samples.end(), [&](const ModelSample& one) {
             return !one.lease && !one.finished && (one.tokens > 0 || config_.live_limit == 0);
           });
  });
  for (const auto& [id, engine] : engines_) {
    const bool idle = engine.there && !engine.leaving && !engine.asked &&
                      engine.version == newest_ && newest_ != kNoVersion && !has_leases(id);
    promise(!(idle && waiting), "no engine idles while what has begun waits");
  }
}

}  // namespace kimisys::rollout::test
