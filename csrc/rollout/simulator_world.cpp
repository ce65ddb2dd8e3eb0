// What the scheduler's actions and the appointments do to the world.
#include "rollout/simulator_world.h"

#include <algorithm>

#include "base/error.h"

namespace kimisys::rollout {

void World::deliver() {
  handling_.swap(events_);
  events_.clear();
  actions_.clear();
  std::size_t taken = 0;
  scheduler_.handle(handling_, actions_, taken);
  outcome_.events += static_cast<std::int64_t>(handling_.size());
  for (const Action& action : actions_) apply(action);
}

void World::apply(const Action& action) {
  switch (action.kind) {
    case ActionKind::kStart:
    case ActionKind::kContinue:
      return start(action);
    case ActionKind::kPause:
      return places_[action.engine].engine.pause(action.lease, now_);
    case ActionKind::kAbort:
      return places_[action.engine].engine.abort(action.lease, now_);
    case ActionKind::kUpdate:
      places_[action.engine].update = action.version;
      return;
    case ActionKind::kWant:
      return offer(action.count);
    case ActionKind::kHandOver:
      ++outcome_.groups.back();
      return;
    case ActionKind::kBatch:
      return batch(action);
    case ActionKind::kRequeue:
    case ActionKind::kDrop:
      return;  // the scheduler's own affairs
  }
}

void World::offer(std::int64_t count) {
  const std::size_t groups = lots_.prompt_tokens.size();
  KIMISYS_CHECK(count <= static_cast<std::int64_t>(groups - offered_), ErrorCode::kScheduler,
                "simulation: the scheduler wants ", count, " more groups in iteration ",
                outcome_.rollout_seconds.size() + 1, " of ", simulation_.iterations, ", and ",
                offered_, " of ", groups,
                " were offered; give the lots more groups, also for what is begun ahead");
  for (const std::size_t end = offered_ + static_cast<std::size_t>(count); offered_ < end;
       ++offered_) {
    Event offered = event(EventKind::kOffered);
    offered.id = offered_;
    offered.tokens = lots_.prompt_tokens[offered_];
    offered.limit = lots_.limit;
    offered.count = lots_.samples;
    events_.push_back(offered);
  }
}

void World::start(const Action& action) {
  const Place& place = places_[action.engine];
  const auto trajectory = static_cast<std::int64_t>(action.group) * lots_.samples + action.sample;
  const std::int64_t length = lots_.lengths[static_cast<std::size_t>(trajectory)];
  const std::int64_t rest = std::min(length, lots_.limit) - action.tokens;
  Sequence sequence;
  sequence.lease = action.lease;
  sequence.context = lots_.prompt_tokens[action.group] + action.tokens;
  // Where the model ends just at the limit, it ended.
  const bool stops = rest <= action.limit && length <= lots_.limit;
  sequence.goal = std::min(rest, action.limit);
  sequence.ends = stops ? EndReason::kStop : EndReason::kLength;
  sequence.trajectory = trajectory;
  sequence.start = now_;
  sequence.version = place.version;
  KIMISYS_CHECK(place.up && !place.updating && sequence.goal >= 1, ErrorCode::kScheduler,
                "simulation: the scheduler starts sample ", action.sample, " of group ",
                action.group, " on engine ", action.engine,
                place.up ? " for no tokens or while it takes a version" : ", which is not there",
                "; this is a bug of the scheduler");
  places_[action.engine].engine.start(sequence, now_);
}

void World::batch(const Action& action) {
  outcome_.rollout_seconds.push_back(seconds_of(now_ - ready_));
  outcome_.tokens.push_back(action.tokens);
  const double training =
      simulation_.train_base + simulation_.train_token * static_cast<double>(action.tokens);
  outcome_.train_seconds.push_back(training);
  const double wait = training + simulation_.reward_latency;
  KIMISYS_CHECK(wait < seconds_of(kMaxTicks - now_), ErrorCode::kScheduler,
                "simulation: training iteration ", outcome_.rollout_seconds.size(), " takes ",
                training, " seconds; are train_base and train_token in seconds?");
  const Ticks trained = now_ + ticks_of(wait);
  if (static_cast<std::int64_t>(outcome_.rollout_seconds.size()) == simulation_.iterations) {
    end_ = trained;
  } else {
    outcome_.groups.push_back(0);
    appoint(trained, Outside::kTrained, kNoEngine, version_ + 1);
  }
}

void World::keep(const Appointment& appointment) {
  switch (appointment.what) {
    case Outside::kTrained: {
      ready_ = now_;
      version_ = appointment.version;
      Event published = event(EventKind::kVersionPublished);
      published.version = version_;
      events_.push_back(published);
      events_.push_back(event(EventKind::kTrainerReady));
      return;
    }
    case Outside::kUpdated: {
      Place& place = places_[appointment.engine];
      if (place.epoch != appointment.epoch) return;
      place.updating = false;
      place.version = appointment.version;
      Event updated = event(EventKind::kEngineUpdated, appointment.engine);
      updated.version = appointment.version;
      events_.push_back(updated);
      return;
    }
    case Outside::kOutage:
      return fail(appointment.engine);
    case Outside::kJoin:
      return join(appointment.engine);
  }
}

void World::fail(EngineId id) {
  Place& place = places_[id];
  std::vector<Sequence> lost;
  place.engine.fail(now_, lost);
  for (const Sequence& sequence : lost) record(sequence, id, EndReason::kFailed);
  place.up = place.updating = false;
  place.update = kNoVersion;
  ++place.epoch;
  events_.push_back(event(EventKind::kEngineFailed, id));
}

void World::record(const Sequence& sequence, EngineId engine, EndReason reason) {
  if (!keep_spans_) return;
  const std::int64_t group = sequence.trajectory / lots_.samples;
  outcome_.spans.push_back({engine, static_cast<GroupId>(group),
                            static_cast<std::uint32_t>(sequence.trajectory % lots_.samples),
                            seconds_of(sequence.start), seconds_of(now_), sequence.made,
                            sequence.version, reason});
}

}  // namespace kimisys::rollout
