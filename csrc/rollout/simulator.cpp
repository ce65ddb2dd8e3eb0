// The course of time.
#include "rollout/simulator.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "rollout/simulator_checks.h"
#include "rollout/simulator_world.h"

namespace kimisys::rollout {

World::World(const Simulation& simulation, const Lots& lots, bool spans)
    : simulation_(simulation), lots_(lots), keep_spans_(spans), scheduler_(simulation.config) {
  for (const EngineModel& model : simulation.engines) {
    places_.push_back({SimulatedEngine(model, ticks_of(simulation.report_interval))});
  }
  if (!simulation.oracle) return;
  scheduler_.reveal([this](GroupId group, std::uint32_t sample) {
    const auto index = group * static_cast<GroupId>(lots_.samples) + sample;
    return std::min(lots_.lengths[static_cast<std::size_t>(index)], lots_.limit);
  });
}

Event World::event(EventKind kind) const {
  Event made;
  made.time = now_ / kTicksPerMicrosecond;
  made.kind = kind;
  return made;
}

Event World::event(EventKind kind, EngineId engine) const {
  Event made = event(kind);
  made.engine = engine;
  return made;
}

void World::join(EngineId id) {
  places_[id].up = true;
  places_[id].version = version_;
  Event joined = event(EventKind::kEngineJoined, id);
  joined.version = version_;
  joined.tokens = simulation_.engines[id].kv_capacity;
  joined.count = simulation_.engines[id].max_sequences;
  events_.push_back(joined);
}

void World::appoint(Ticks time, Outside what, EngineId engine, std::int64_t version) {
  const std::uint64_t epoch = engine == kNoEngine ? 0 : places_[engine].epoch;
  appointments_.push({time, appointed_++, what, engine, version, epoch});
}

void World::set_out() {
  for (const Outage& outage : simulation_.outages) {
    appoint(ticks_of(outage.time), Outside::kOutage, outage.engine, kNoVersion);
    appoint(ticks_of(outage.until), Outside::kJoin, outage.engine, kNoVersion);
  }
  Event published = event(EventKind::kVersionPublished);
  published.version = version_;
  events_.push_back(published);
  for (EngineId id = 0; id < places_.size(); ++id) join(id);
  outcome_.groups.push_back(0);
  events_.push_back(event(EventKind::kTrainerReady));
  live_through();
}

Outcome World::run() {
  set_out();
  while (end_ == kNoTicks) {
    const Ticks next = next_time();
    KIMISYS_CHECK(
        next != kNoTicks, ErrorCode::kScheduler, "simulation: nothing happens any more at ",
        seconds_of(now_), " seconds, in iteration ", outcome_.rollout_seconds.size() + 1, " of ",
        simulation_.iterations,
        ", and the batch is not complete; does the configuration ask for more groups than ",
        "the lots have (", lots_.prompt_tokens.size(), ")?");
    KIMISYS_CHECK(next < kMaxTicks, ErrorCode::kScheduler,
                  "simulation: more than ten days of simulated time; simulate fewer iterations");
    now_ = std::max(now_, next);
    for (Place& place : places_) {
      if (place.engine.boundary() == now_) place.engine.settle();
    }
    live_through();
  }
  return close();
}

Ticks World::next_time() {
  Ticks next = appointments_.empty() ? kNoTicks : appointments_.top().time;
  for (const Place& place : places_) next = std::min(next, place.engine.boundary());
  const std::int64_t deadline = scheduler_.next_deadline();
  if (deadline < kMaxTicks / kTicksPerMicrosecond) {
    next = std::min(next, deadline * kTicksPerMicrosecond);
  }
  return next;
}

// All that happens at this moment, until nothing does; then the engines take their next steps.
void World::live_through() {
  while (end_ == kNoTicks) {
    if (!events_.empty()) {
      deliver();
    } else if (!keep_appointment() && !hear_engine() && !wake_scheduler()) {
      break;
    }
  }
  if (end_ == kNoTicks) begin_steps();
}

bool World::keep_appointment() {
  if (appointments_.empty() || appointments_.top().time > now_) return false;
  const Appointment appointment = appointments_.top();
  appointments_.pop();
  keep(appointment);
  return true;
}

bool World::hear_engine() {
  for (EngineId id = 0; id < places_.size(); ++id) {
    SimulatedEngine& engine = places_[id].engine;
    if (engine.boundary() == now_) engine.settle();  // a command of this moment shortened its steps
    if (!engine.has_news() || !engine.between_steps()) continue;
    words_.clear();
    engine.say(words_);
    for (const Word& word : words_) {
      if (word.reason != EndReason::kNone) record(word.sequence, id, word.reason);
      if (word.sequence.aborted) continue;
      Event said =
          event(word.reason == EndReason::kNone ? EventKind::kTokens : EventKind::kSegmentEnded);
      said.engine = id;
      said.id = word.sequence.lease;
      said.tokens = word.tokens;
      said.reason = word.reason;
      events_.push_back(said);
    }
    return true;
  }
  return false;
}

bool World::wake_scheduler() {
  const std::int64_t due = scheduler_.next_deadline();
  if (due > now_ / kTicksPerMicrosecond) return false;
  events_.push_back(event(EventKind::kTime));
  deliver();
  KIMISYS_CHECK(scheduler_.next_deadline() > due || !events_.empty(), ErrorCode::kScheduler,
                "simulation: the scheduler's deadline at ", due,
                " microseconds is still due after kTime; this is a bug of the scheduler");
  return true;
}

void World::begin_steps() {
  for (EngineId id = 0; id < places_.size(); ++id) {
    Place& place = places_[id];
    if (!place.up || place.updating || !place.engine.between_steps()) continue;
    if (place.update != kNoVersion && place.engine.empty()) {
      place.updating = true;
      appoint(now_ + ticks_of(simulation_.engines[id].update), Outside::kUpdated, id, place.update);
      place.update = kNoVersion;
    } else {
      place.engine.begin(now_);
    }
  }
}

Outcome World::close() {
  outcome_.seconds = seconds_of(end_);
  outcome_.offered = static_cast<std::int64_t>(offered_);
  for (EngineId id = 0; id < places_.size(); ++id) {
    SimulatedEngine& engine = places_[id].engine;
    // What still runs when the last batch is complete is cut there.
    std::vector<Sequence> rest;
    engine.fail(now_, rest);
    for (const Sequence& sequence : rest) record(sequence, id, EndReason::kPaused);
    outcome_.decoded += engine.decoded();
    outcome_.prefilled += engine.prefilled();
    outcome_.preempted += engine.preempted();
    outcome_.busy.push_back(seconds_of(engine.busy()));
  }
  outcome_.ledger = scheduler_.ledger();
  outcome_.digest = scheduler_.digest();
  return std::move(outcome_);
}

Outcome simulate(const Simulation& simulation, const Lots& lots, bool spans) {
  check(simulation, lots);
  World world(simulation, lots, spans);
  return world.run();
}

}  // namespace kimisys::rollout
