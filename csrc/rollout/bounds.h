// What no schedule of whole iterations can beat, however much it knows.
#pragma once

#include <vector>

#include "rollout/simulated_engine.h"
#include "rollout/simulator.h"

namespace kimisys::rollout {

// Seconds of rollouts, by iteration. Both hold for every schedule of the engine model of
// simulator.h, with true lengths known, preemption and moves at will; the proofs stand in
// bounds.cpp.
struct Bounds {
  std::vector<double> area;  // all the work, shared out evenly among engines filled to the brim
  std::vector<double> path;  // the longest trajectory, alone on the best of all engines
  // From the start to the end of the last training: the greater of the two of each iteration, the
  // versions' updates, rewards and training.
  double seconds = 0;
};

// Iteration i has the groups i * config.groups and on. Raises SchedulerError for numbers that make
// no sense, lots that do not suffice, and for configurations whose iterations do not have those
// groups and no others: with a token budget, over-issue, or engines that go on while the trainer
// trains.
Bounds bounds(const Simulation& simulation, const Lots& lots);

// A trajectory without its name.
struct Output {
  std::int64_t prompt = 0;  // tokens
  std::int64_t length = 0;  // of output, cut at the limit
};

// What a set of trajectories needs of an engine, in units of the engine's costs.
struct Work {
  double tokens = 0;   // steps of sequences
  double kv = 0;       // KV tokens read, over all steps
  double prefill = 0;  // tokens
  std::int64_t longest = 0;

  void add(const Output& output);
};

// Fewest seconds in which one engine can do that. Exact where all start at once and fit until their
// ends.
double least_seconds(const Work& work, const EngineModel& model);

// Checked as bounds() does: the trajectories of each iteration, in order.
std::vector<std::vector<Output>> whole_iterations(const Simulation& simulation, const Lots& lots);
// What the seconds of bounds() are made of apart from rollouts.
double seconds_between(const Simulation& simulation,
                       const std::vector<std::vector<Output>>& iterations);

}  // namespace kimisys::rollout
