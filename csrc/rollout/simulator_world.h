// The world around one scheduler: engines, trainer and what comes from outside.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <tuple>
#include <vector>

#include "rollout/scheduler.h"
#include "rollout/simulated_engine.h"
#include "rollout/simulator.h"

namespace kimisys::rollout {

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

}  // namespace kimisys::rollout
