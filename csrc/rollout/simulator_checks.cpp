#include "rollout/simulator_checks.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace kimisys::rollout {

namespace {

constexpr double kDay = 86400;                         // seconds
constexpr std::int64_t kMany = std::int64_t{1} << 40;  // tokens: sums of such stay in 64 bits
constexpr std::int64_t kLong = std::int64_t{1} << 31;  // tokens: what an event may speak of

bool is_seconds(double value) { return value >= 0 && value <= 10 * kDay; }

void check_seconds(const char* field, double value) {
  KIMISYS_CHECK(is_seconds(value), ErrorCode::kScheduler, "simulation: ", field, " is ", value,
                "; give seconds from 0 to ", 10 * kDay);
}

void check_outages(const Simulation& simulation) {
  for (const Outage& outage : simulation.outages) {
    KIMISYS_CHECK(outage.engine < simulation.engines.size(), ErrorCode::kScheduler,
                  "outage of engine ", outage.engine, ": there are ", simulation.engines.size(),
                  " engines; name one of them, counted from 0");
    KIMISYS_CHECK(is_seconds(outage.time) && is_seconds(outage.until) && outage.time < outage.until,
                  ErrorCode::kScheduler, "outage of engine ", outage.engine, " from ", outage.time,
                  " to ", outage.until, " seconds; let it end after it began, both at least 0");
    for (const Outage& other : simulation.outages) {
      KIMISYS_CHECK(&other == &outage || other.engine != outage.engine ||
                        other.until < outage.time || outage.until < other.time,
                    ErrorCode::kScheduler, "engine ", outage.engine,
                    " has two outages that overlap or touch, from ", outage.time, " and from ",
                    other.time, " seconds; make them one");
    }
  }
}

void check_lengths(const Lots& lots) {
  KIMISYS_CHECK(lots.samples >= 1 && lots.samples <= 1 << 16, ErrorCode::kScheduler,
                "lots: samples is ", lots.samples, "; give at least 1 and at most 65536");
  KIMISYS_CHECK(lots.limit >= 1 && lots.limit <= kLong, ErrorCode::kScheduler, "lots: limit is ",
                lots.limit, "; give the most output tokens of a trajectory, at least 1");
  KIMISYS_CHECK(!lots.prompt_tokens.empty(), ErrorCode::kScheduler,
                "lots: no groups; give prompt_tokens of at least one");
  const std::size_t expected = lots.prompt_tokens.size() * static_cast<std::size_t>(lots.samples);
  KIMISYS_CHECK(lots.lengths.size() == expected, ErrorCode::kScheduler,
                "lots: ", lots.lengths.size(), " lengths for ", lots.prompt_tokens.size(),
                " groups of ", lots.samples, " samples; give ", expected);
  for (std::size_t i = 0; i < lots.lengths.size(); ++i) {
    const std::int64_t prompt = lots.prompt_tokens[i / static_cast<std::size_t>(lots.samples)];
    KIMISYS_CHECK(lots.lengths[i] >= 1 && lots.lengths[i] <= kMany, ErrorCode::kScheduler,
                  "lots: length ", i, " is ", lots.lengths[i], "; each is at least 1 token");
    KIMISYS_CHECK(prompt >= 1 && prompt <= kLong, ErrorCode::kScheduler,
                  "lots: the prompt of group ", i / static_cast<std::size_t>(lots.samples), " has ",
                  prompt, " tokens; each has at least 1");
  }
}

}  // namespace

void check(const EngineModel& model, std::size_t engine) {
  KIMISYS_CHECK(model.step >= 1e-9 && model.step <= kDay, ErrorCode::kScheduler, "engine ", engine,
                ": step is ", model.step, " seconds; a step takes time: give 1e-9 to a day");
  for (const double cost : {model.sequence, model.kv_token, model.prefill_token, model.update}) {
    KIMISYS_CHECK(is_seconds(cost), ErrorCode::kScheduler, "engine ", engine, ": a cost is ", cost,
                  " seconds; sequence, kv_token, prefill_token and update are at least 0");
  }
  KIMISYS_CHECK(model.kv_capacity >= 1 && model.kv_capacity <= kMany, ErrorCode::kScheduler,
                "engine ", engine, ": kv_capacity is ", model.kv_capacity,
                "; give tokens, 1 to 2^40");
  KIMISYS_CHECK(model.max_sequences >= 1 && model.max_sequences <= 1 << 20, ErrorCode::kScheduler,
                "engine ", engine, ": max_sequences is ", model.max_sequences,
                "; give 1 to 1048576");
  const double full =
      model.step + model.sequence * static_cast<double>(model.max_sequences) +
      (model.kv_token + model.prefill_token) * static_cast<double>(model.kv_capacity);
  KIMISYS_CHECK(full <= kDay, ErrorCode::kScheduler, "engine ", engine,
                ": a step of a full engine ", "that computes its whole cache takes ", full,
                " seconds, more than a day; are the costs in seconds?");
}

void check(const Simulation& simulation) {
  KIMISYS_CHECK(!simulation.engines.empty() && simulation.engines.size() <= 1 << 16,
                ErrorCode::kScheduler, "simulation: ", simulation.engines.size(),
                " engines; give 1 to 65536");
  for (std::size_t e = 0; e < simulation.engines.size(); ++e) check(simulation.engines[e], e);
  KIMISYS_CHECK(simulation.iterations >= 1, ErrorCode::kScheduler, "simulation: iterations is ",
                simulation.iterations, "; simulate at least 1");
  check_seconds("train_base", simulation.train_base);
  check_seconds("train_token", simulation.train_token);
  check_seconds("reward_latency", simulation.reward_latency);
  check_seconds("report_interval", simulation.report_interval);
  KIMISYS_CHECK(simulation.report_interval == 0 || simulation.report_interval >= 1e-6,
                ErrorCode::kScheduler, "simulation: report_interval is ",
                simulation.report_interval, "; give at least a microsecond, or 0 for none");
  KIMISYS_CHECK(
      simulation.report_interval * 1e6 < static_cast<double>(simulation.config.lease_timeout),
      ErrorCode::kScheduler, "simulation: report_interval is ", simulation.report_interval,
      " seconds and config.lease_timeout ", simulation.config.lease_timeout,
      " microseconds, so that leases die between two reports; let leases live longer");
  check_outages(simulation);
}

void check(const Simulation& simulation, const Lots& lots) {
  check(simulation);
  check_lengths(lots);
  for (std::size_t i = 0; i < lots.lengths.size(); ++i) {
    const std::size_t group = i / static_cast<std::size_t>(lots.samples);
    const std::int64_t most = lots.prompt_tokens[group] + std::min(lots.lengths[i], lots.limit);
    for (std::size_t e = 0; e < simulation.engines.size(); ++e) {
      KIMISYS_CHECK(most <= simulation.engines[e].kv_capacity, ErrorCode::kScheduler,
                    "lots: sample ", i % static_cast<std::size_t>(lots.samples), " of group ",
                    group, " grows to ", most, " tokens, and the KV cache of engine ", e, " holds ",
                    simulation.engines[e].kv_capacity,
                    "; no engine could end it: lower the limit, or give the engine more");
    }
  }
}

}  // namespace kimisys::rollout
