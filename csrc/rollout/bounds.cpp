#include "rollout/bounds.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "rollout/simulator_checks.h"

namespace kimisys::rollout {

namespace {

// The costs as the engine rounds them.
struct Seconds {
  double step, sequence, kv_token, prefill_token;

  explicit Seconds(const EngineModel& model) {
    const StepCosts costs(model);
    step = seconds_of(costs.step);
    sequence = seconds_of(costs.sequence);
    kv_token = seconds_of(costs.kv_token);
    prefill_token = seconds_of(costs.prefill_token);
  }
};

// One trajectory of prompt p and length l makes its l tokens in l different steps, each of which
// takes at least what it takes with this sequence alone: step + sequence + kv_token * (p + k) for
// token k, and one of them computes the prompt. No two of these steps overlap in time, on whatever
// engines they are, so their sum bounds every schedule from below; with the least of each cost over
// the engines, also where it moves from engine to engine.
double path_seconds(const std::vector<Output>& outputs, const std::vector<EngineModel>& engines) {
  Seconds least(engines.front());
  for (const EngineModel& model : engines) {
    const Seconds costs(model);
    least.step = std::min(least.step, costs.step);
    least.sequence = std::min(least.sequence, costs.sequence);
    least.kv_token = std::min(least.kv_token, costs.kv_token);
    least.prefill_token = std::min(least.prefill_token, costs.prefill_token);
  }
  double longest = 0;
  for (const Output& output : outputs) {
    Work alone;
    alone.add(output);
    longest =
        std::max(longest, (least.step + least.sequence) * alone.tokens + least.kv_token * alone.kv +
                              least.prefill_token * alone.prefill);
  }
  return longest;
}

// An engine's time is the sum over its steps of step + sequence * b + kv_token * c + prefill, with
// b sequences that hold c tokens. Over all engines the b sum up to the tokens made, N, the c to C =
// the sum of the contexts that the tokens were made at, and the prefill is at least the prompts, P,
// whatever is preempted or moved. Each step must be paid for with shares of the tokens made in it
// that sum up to at most one. Three such shares: 1/max_sequences of each token; context /
// kv_capacity, as what runs must fit; and one of each token of the longest trajectory, which makes
// at most one in a step. So the engine's time is at least
//     step * Q + sequence * N + kv_token * C + prefill_token * P
// of what was done there, with Q = N / max_sequences, C / kv_capacity or the longest's tokens.
// Let the makespan be T, and z >= 0 sum up to 1 over the engines e. Then T >= sum of z_e * T_e >=
// y * (totals), with y the least z_e * cost_e of each cost: that is valid for any z, and taken here
// with z_e in inverse proportion to what e would need for all. Of equal engines: all / engines.
double area_seconds(const Work& work, const std::vector<EngineModel>& engines) {
  double best = 0;
  for (const int share : {0, 1, 2}) {
    const auto costs_of = [&](const EngineModel& model) {
      const Seconds costs(model);
      const double steps = share == 0   ? work.tokens / static_cast<double>(model.max_sequences)
                           : share == 1 ? work.kv / static_cast<double>(model.kv_capacity)
                                        : static_cast<double>(work.longest);
      return std::array{costs.step * steps, costs.sequence * work.tokens, costs.kv_token * work.kv,
                        costs.prefill_token * work.prefill};
    };
    double inverse = 0;
    for (const EngineModel& model : engines) {
      const auto parts = costs_of(model);
      inverse += 1 / (parts[0] + parts[1] + parts[2] + parts[3]);
    }
    std::array<double, 4> least;
    least.fill(INFINITY);
    for (const EngineModel& model : engines) {
      const auto parts = costs_of(model);
      const double z = 1 / (parts[0] + parts[1] + parts[2] + parts[3]) / inverse;
      for (std::size_t i = 0; i < 4; ++i) least[i] = std::min(least[i], z * parts[i]);
    }
    best = std::max(best, least[0] + least[1] + least[2] + least[3]);
  }
  return best;
}

}  // namespace

void Work::add(const Output& output) {
  const auto length = static_cast<double>(output.length);
  const auto prompt = static_cast<double>(output.prompt);
  tokens += length;
  kv += prompt * length + length * (length - 1) / 2;
  prefill += prompt;
  longest = std::max(longest, output.length);
}

double least_seconds(const Work& work, const EngineModel& model) {
  const Seconds costs(model);
  const double steps = std::max({work.tokens / static_cast<double>(model.max_sequences),
                                 work.kv / static_cast<double>(model.kv_capacity),
                                 static_cast<double>(work.longest)});
  return costs.step * steps + costs.sequence * work.tokens + costs.kv_token * work.kv +
         costs.prefill_token * work.prefill;
}

std::vector<std::vector<Output>> whole_iterations(const Simulation& simulation, const Lots& lots) {
  check(simulation, lots);
  check(simulation.config);
  const Config& config = simulation.config;
  KIMISYS_CHECK(config.token_budget == 0 && config.deployment == Deployment::kAlternate &&
                    config.over_issue == 1,
                ErrorCode::kScheduler,
                "bounds and offline schedules are for whole iterations: give a configuration with "
                "token_budget 0, over_issue 1 and deployment alternate");
  const std::int64_t groups = config.groups;
  const auto offered = static_cast<std::int64_t>(lots.prompt_tokens.size());
  KIMISYS_CHECK(groups <= offered / simulation.iterations, ErrorCode::kScheduler,
                simulation.iterations, " iterations of ", groups, " groups: the lots have ",
                offered, "; give them more groups");
  std::vector<std::vector<Output>> iterations;
  for (std::int64_t i = 0; i < simulation.iterations; ++i) {
    std::vector<Output>& outputs = iterations.emplace_back();
    for (std::int64_t s = i * groups * lots.samples; s < (i + 1) * groups * lots.samples; ++s) {
      const auto prompt = lots.prompt_tokens[static_cast<std::size_t>(s / lots.samples)];
      outputs.push_back({prompt, std::min(lots.lengths[static_cast<std::size_t>(s)], lots.limit)});
    }
  }
  return iterations;
}

double seconds_between(const Simulation& simulation,
                       const std::vector<std::vector<Output>>& iterations) {
  // Each engine takes the version before it starts anything. One that was away may come back with
  // it.
  double update = INFINITY;
  for (const EngineModel& model : simulation.engines) update = std::min(update, model.update);
  if (!simulation.outages.empty()) update = 0;
  double seconds = update * static_cast<double>(iterations.size() - 1);
  for (const std::vector<Output>& outputs : iterations) {
    double tokens = 0;
    for (const Output& output : outputs) tokens += static_cast<double>(output.length);
    seconds += simulation.reward_latency + simulation.train_base + simulation.train_token * tokens;
  }
  return seconds;
}

Bounds bounds(const Simulation& simulation, const Lots& lots) {
  const std::vector<std::vector<Output>> iterations = whole_iterations(simulation, lots);
  Bounds found;
  found.seconds = seconds_between(simulation, iterations);
  for (const std::vector<Output>& outputs : iterations) {
    Work work;
    for (const Output& output : outputs) work.add(output);
    found.area.push_back(area_seconds(work, simulation.engines));
    found.path.push_back(path_seconds(outputs, simulation.engines));
    found.seconds += std::max(found.area.back(), found.path.back());
  }
  return found;
}

}  // namespace kimisys::rollout
