// Discrete events around the compiled scheduler: engines with a linear time model, a trainer,
// updates and failures. The scheduler sees lengths only as they happen.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rollout/config.h"
#include "rollout/ledger.h"
#include "rollout/types.h"

namespace kimisys::rollout {

// A decode step of `batch` sequences that hold `kv` tokens takes step + sequence * batch + kv_token
// * kv; prefill of n tokens adds prefill_token * n to the step it happens in. Seconds.
struct EngineModel {
  double step = 4e-3;
  double sequence = 60e-6;
  double kv_token = 20e-9;
  double prefill_token = 20e-6;
  std::int64_t kv_capacity = 1 << 20;  // tokens; beyond it the youngest sequence is preempted
  std::int64_t max_sequences = 256;
  double update = 0.1;  // seconds that taking a version takes
};

struct Outage {
  EngineId engine = 0;
  double time = 0;   // seconds
  double until = 0;  // when it joins again
};

struct Simulation {
  Config config;
  std::vector<EngineModel> engines;
  std::int64_t iterations = 1;    // batches
  double train_base = 0;          // seconds of an iteration's training
  double train_token = 0;         // seconds per trained token
  double reward_latency = 0;      // seconds from the last group's end to the training's begin
  double report_interval = 0.05;  // seconds between two words of a lease; 0: at its end alone
  std::vector<Outage> outages;
  // The predictor is told the true lengths: what no scheduler can have, to compare with.
  bool oracle = false;
};

// Groups in the order of the offers: lengths has groups * samples entries.
struct Lots {
  std::vector<std::int64_t> prompt_tokens;  // by group
  std::vector<std::int64_t> lengths;        // of output, as the model would end it
  std::int64_t samples = 8;
  std::int64_t limit = 0;  // of output: longer ones are cut there
};

struct Span {  // one segment as it ran, for the picture
  EngineId engine = 0;
  GroupId group = 0;
  std::uint32_t sample = 0;
  double start = 0;  // seconds, when the scheduler asked for it
  double end = 0;
  std::int64_t tokens = 0;
  std::int64_t version = 0;
  EndReason reason = EndReason::kNone;
};

struct Outcome {
  double seconds = 0;                   // until the last batch was trained
  std::vector<double> rollout_seconds;  // by iteration: from kTrainerReady to kBatch
  std::vector<double> train_seconds;    // by iteration, without the reward's latency
  std::vector<std::int64_t> tokens;     // handed over, by iteration
  std::vector<std::int64_t> groups;     // handed over, by iteration
  std::int64_t offered = 0;             // groups, handed over or not
  std::int64_t decoded = 0;             // tokens made until the last kBatch, useful or not
  std::int64_t prefilled = 0;           // prompt and output tokens whose KV was computed
  std::int64_t preempted = 0;           // of those, again, because an engine's cache overflowed
  std::vector<double> busy;             // seconds, by engine
  std::vector<Span> spans;              // only if asked for
  Ledger ledger;
  std::uint64_t digest = 0;  // the scheduler's
  std::int64_t events = 0;
};

// All prompts are there from the start: kWant is answered at once, in the order of the lots. A
// batch is trained after the reward's latency; then the next version is published and the trainer
// is ready again. What engines are told within a step they do at its end. Engines report on a
// common grid of report_interval; one that waits inside an engine says nothing, so lease_timeout
// must be longer than that. Costs are rounded to 1e-13 seconds, so that the time of many steps is
// exact.
//
// Raises SchedulerError for numbers that make no sense, and if the lots do not suffice: what the
// scheduler wants ahead in the last iteration is part of it.
Outcome simulate(const Simulation& simulation, const Lots& lots, bool spans = false);

}  // namespace kimisys::rollout
