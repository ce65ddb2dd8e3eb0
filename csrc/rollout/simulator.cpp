#include "rollout/simulator.h"

#include <algorithm>
#include <queue>
#include <tuple>

#include "base/error.h"
#include "rollout/scheduler.h"
#include "rollout/simulated_engine.h"
#include "rollout/simulator_checks.h"

namespace kimisys::rollout {

namespace {

// What happens at a known time, apart from the engines' steps.
enum class Outside : std::uint32_t { kOutage, kJoin, kUpdated, kTrained };

struct Appointment {
  Ticks time = 0;
  std::uint64_t order = 0;  // of two at one time, the one that was made first
  Outside what = Outside::kTrained;
  EngineId engine = kNoEngine;
  std::int64_t version = kNoVersion;
  std::uint64_t epoch = 0;  // of the engine: an update ends with the engine that takes it

  bool operator>(const Appointment& other) const {
    return std::tie(time, order) > std::tie(other.time, other.order);
  }
};

struct Place {  // an engine and what the world knows of it
  SimulatedEngine engine;
  bool up = false;
  bool updating = false;
  std::int64_t update = kNoVersion;  // to be taken when the step ends
  std::int64_t version = kNoVersion;
  std::uint64_t epoch = 0;
};

class World {
 public:
  World(const Simulation& simulation, const Lots& lots, bool spans);
  Outcome run();

 private:
  void set_out();
  Ticks next_time();
  void live_through();
  bool keep_appointment();
  bool hear_engine();
  bool wake_scheduler();
  void begin_steps();

  void deliver();
  void apply(const Action& action);
  void offer(std::int64_t count);
  void start(const Action& action);
  void batch(const Action& action);
  void keep(const Appointment& appointment);
  void join(EngineId id);
  void fail(EngineId id);
  void appoint(Ticks time, Outside what, EngineId engine, std::int64_t version);
  void record(const Sequence& sequence, EngineId engine, EndReason reason);
  Event event(EventKind kind) const;
  Event event(EventKind kind, EngineId engine) const;
  Outcome close();

  const Simulation& simulation_;
  const Lots& lots_;
  const bool keep_spans_;
  Scheduler scheduler_;
  std::vector<Place> places_;
  std::priority_queue<Appointment, std::vector<Appointment>, std::greater<>> appointments_;
  std::uint64_t appointed_ = 0;

  Ticks now_ = 0;
  Ticks ready_ = 0;  // the trainer's last kTrainerReady
  Ticks end_ = kNoTicks;
  std::int64_t version_ = 0;
  std::size_t offered_ = 0;

  std::vector<Event> events_;    // to be delivered now
  std::vector<Event> handling_;  // kept for their memory, as are the next two
  std::vector<Action> actions_;
  std::vector<Word> words_;
  Outcome outcome_;
};

World::World(const Simulation& simulation, const Lots& lots, bool spans)
    : simulation_(simulation), lots_(lots), keep_spans_(spans), scheduler_(simulation.config) {
  for (const EngineModel& model : simulation.engines) {
    places_.push_back({SimulatedEngine(model, ticks_of(simulation.report_interval))});
  }
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
  KIMISYS_CHECK(offered_ < groups, ErrorCode::kScheduler, "simulation: the scheduler wants ", count,
                " more groups in iteration ", outcome_.rollout_seconds.size() + 1, " of ",
                simulation_.iterations, ", and all ", groups,
                " were offered; give the lots more groups");
  for (; count > 0 && offered_ < groups; --count, ++offered_) {
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

}  // namespace

Outcome simulate(const Simulation& simulation, const Lots& lots, bool spans) {
  check(simulation, lots);
  World world(simulation, lots, spans);
  return world.run();
}

}  // namespace kimisys::rollout
