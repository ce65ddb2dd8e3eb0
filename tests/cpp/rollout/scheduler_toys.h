// A toy world around a scheduler: engines that make tokens at random, answer late, fail, leave and
// come back; prompts, versions and a trainer at random times; and events that nobody may send. It
// has a seed of its own and sends what a real world could send.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <span>
#include <vector>

#include "rollout/scheduler.h"
#include "rollout/scheduler_model.h"

namespace kimisys::rollout::test {

// A composition of policies that check() takes.
Config random_config(std::mt19937_64& random);

class Toys {
 public:
  Toys(const Config& config, std::uint64_t seed);

  // One more event, legal; with `illegal` in a thousand one that is not before it.
  void step(int illegal = 0);

  // A benign world from here on: everything that was offered is to be done within `steps`.
  // Returns whether it was.
  bool finish(int steps);

  const std::vector<Event>& events() const { return events_; }
  const std::vector<Action>& actions() const { return actions_; }
  const Scheduler& scheduler() const { return scheduler_; }
  const Model& model() const { return model_; }
  std::int64_t refused() const { return refused_; }

 private:
  struct Segment {  // at an engine, live or dead
    EngineId engine = kNoEngine;
    std::int64_t length = 0;  // of the whole trajectory, as the model would end it
    std::int64_t tokens = 0;  // so far
    std::int64_t left = 0;    // that the lease allows
    bool pausing = false;
    bool dead = false;  // its engine failed: it makes no more
    bool ended = false;
    std::deque<Event> on_its_way;  // in the order in which the engine said it
  };

  std::int64_t draw(std::int64_t least, std::int64_t most);
  bool one_in(std::int64_t n) { return draw(1, n) == 1; }
  void send(Event event);
  void take(const Action& action);
  Event next();
  Event benign();
  Event offer();
  Event join(EngineId engine);
  Event publish();
  Event word();
  Event engine_event();
  void make(Lease lease, Segment& segment);
  Lease pick(const std::vector<Lease>& leases);
  void expect_refused(Event event);
  Event illegal();
  Event illegal_engine();

  std::mt19937_64 random_;
  Scheduler scheduler_;
  Model model_;
  Config config_;
  std::uint64_t lengths_;
  std::int64_t now_ = 0;
  GroupId next_group_ = 1;
  std::int64_t published_ = kNoVersion;
  std::map<Lease, Segment> segments_;
  std::map<EngineId, std::int64_t> asked_;  // versions that engines take
  std::vector<Event> events_;
  std::vector<Action> actions_;
  std::int64_t refused_ = 0;
  bool patient_ = false;  // nothing is late any more
};

}  // namespace kimisys::rollout::test
