#include "rollout/simulator.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "expect.h"
#include "simulator_naive.h"

using namespace kimisys;           // NOLINT: a test file
using namespace kimisys::rollout;  // NOLINT

namespace {

using Random = std::mt19937_64;

std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
}

double seconds(Random& random, double most) {
  return most * static_cast<double>(between(random, 0, 1000)) / 1000;
}

Config random_config(Random& random) {
  Config config;
  config.deployment = static_cast<Deployment>(between(random, 0, 1));
  config.placement = static_cast<Placement>(between(random, 0, 3));
  config.order = static_cast<Order>(between(random, 0, 2));
  config.concurrency = static_cast<Concurrency>(between(random, 0, 1));
  config.update = static_cast<Update>(between(random, 0, 1));
  config.groups = between(random, 1, 5);
  if (between(random, 0, 1) == 0) {
    config.token_budget = between(random, 100, 1500);
    config.live_limit = between(random, 0, 1) * between(random, 2, 30);
  } else if (between(random, 0, 1) == 0) {
    config.over_issue = 1.5;
  }
  config.segment_tokens = between(random, 0, 2) == 0 ? between(random, 5, 60) : 0;
  config.lease_timeout = between(random, 0, 3) == 0 ? 200'000 : 1'000'000'000'000;
  if (between(random, 0, 2) == 0) {
    config.max_staleness = between(random, 1, 3);
    config.staleness = static_cast<Staleness>(between(random, 0, 2));
  }
  return config;
}

EngineModel random_engine(Random& random) {
  EngineModel model;
  model.step = 1e-3 * static_cast<double>(between(random, 1, 9));
  model.sequence = 1e-5 * static_cast<double>(between(random, 0, 9));
  model.kv_token = 1e-7 * static_cast<double>(between(random, 0, 9));
  model.prefill_token = 1e-6 * static_cast<double>(between(random, 0, 50));
  model.kv_capacity = between(random, 120, 600);
  model.max_sequences = between(random, 1, 12);
  model.update = seconds(random, 0.1);
  return model;
}

Lots random_lots(Random& random, std::int64_t groups) {
  Lots lots;
  lots.samples = between(random, 1, 4);
  lots.limit = between(random, 20, 80);
  for (std::int64_t group = 0; group < groups; ++group) {
    lots.prompt_tokens.push_back(between(random, 1, 30));
    for (std::int64_t sample = 0; sample < lots.samples; ++sample) {
      const double length = std::exp(3 + static_cast<double>(between(random, -150, 150)) / 100);
      lots.lengths.push_back(std::max<std::int64_t>(1, std::llround(length)));
    }
  }
  return lots;
}

Simulation random_simulation(Random& random) {
  Simulation simulation;
  simulation.config = random_config(random);
  // Engines that are alike end steps at the same moments, others do not.
  simulation.engines.assign(static_cast<std::size_t>(between(random, 1, 4)), random_engine(random));
  if (between(random, 0, 1) == 0) simulation.engines.push_back(random_engine(random));
  simulation.iterations = between(random, 1, 4);
  simulation.train_base = seconds(random, 0.3);
  simulation.train_token = seconds(random, 1e-4);
  simulation.reward_latency = seconds(random, 0.1);
  simulation.oracle = between(random, 0, 3) == 0;
  // A lease that says nothing before its deadline would begin again for ever.
  const bool patient = simulation.config.lease_timeout > 1'000'000;
  const bool silent = patient && between(random, 0, 3) == 0;
  simulation.report_interval = silent ? 0 : 1e-6 + seconds(random, 0.1);
  if (between(random, 0, 2) == 0) {
    const auto last = static_cast<EngineId>(simulation.engines.size() - 1);
    const double time = seconds(random, 0.5);
    simulation.outages.push_back({last, time, time + 0.01 + seconds(random, 0.5)});
    simulation.outages.push_back({0, 0.25, 0.5});
    if (last == 0) simulation.outages.pop_back();
  }
  return simulation;
}

void expect_equal(const Outcome& fast, const Outcome& naive) {
  CHECK(fast.digest == naive.digest);
  CHECK(fast.events == naive.events);
  CHECK(fast.seconds == naive.seconds);
  CHECK(fast.rollout_seconds == naive.rollout_seconds);
  CHECK(fast.tokens == naive.tokens);
  CHECK(fast.groups == naive.groups);
  CHECK(fast.decoded == naive.decoded);
  CHECK(fast.prefilled == naive.prefilled);
  CHECK(fast.preempted == naive.preempted);
  CHECK(fast.busy == naive.busy);
}

Simulation plain(std::int64_t groups) {
  Simulation simulation;
  simulation.config.groups = groups;
  simulation.config.concurrency = Concurrency::kFixed;
  simulation.config.placement = Placement::kLeastLoaded;
  simulation.config.order = Order::kFifo;
  simulation.engines.assign(1, EngineModel{});
  return simulation;
}

}  // namespace

TEST_CASE("jumping over steps is the same as taking them one by one") {
  Random random(11);
  int preempting = 0;
  int timeouts = 0;
  for (int round = 0; round < 1500; ++round) {
    CAPTURE(round);
    const Simulation simulation = random_simulation(random);
    const Lots lots = random_lots(random, 800);
    CAPTURE(simulation.config);
    const Outcome fast = simulate(simulation, lots);
    expect_equal(fast, test::NaiveWorld(simulation, lots).run());
    preempting += fast.preempted > 0;
    timeouts += fast.ledger.requeued > 0;
  }
  CHECK(preempting > 100);  // the cases are hard enough
  CHECK(timeouts > 100);
}

TEST_CASE("one engine, one group: the formulas") {
  const Lots lots{{100}, {10, 20}, 2, 1000};
  Simulation simulation = plain(1);
  simulation.train_base = 3;
  simulation.train_token = 0.1;
  simulation.reward_latency = 0.5;
  const Outcome outcome = simulate(simulation, lots, true);
  const double kv = 100 * 30 + 45 + 190;
  const double rollouts = 20 * 4e-3 + 30 * 60e-6 + kv * 20e-9 + 200 * 20e-6;
  CHECK(outcome.rollout_seconds.at(0) == doctest::Approx(rollouts).epsilon(1e-12));
  CHECK(outcome.train_seconds.at(0) == doctest::Approx(6).epsilon(1e-12));
  CHECK(outcome.seconds == doctest::Approx(rollouts + 6.5).epsilon(1e-12));
  CHECK(outcome.busy.at(0) == outcome.rollout_seconds[0]);
  CHECK(outcome.tokens == std::vector<std::int64_t>{30});
  CHECK(outcome.groups == std::vector<std::int64_t>{1});
  CHECK(outcome.decoded == 30);
  CHECK(outcome.prefilled == 200);
  CHECK(outcome.offered == 1);
  REQUIRE(outcome.spans.size() == 2);
  CHECK(outcome.spans[0].tokens == 10);
  CHECK(outcome.spans[1].tokens == 20);
  CHECK(outcome.spans[1].end == outcome.rollout_seconds[0]);
  CHECK(outcome.spans[1].reason == EndReason::kStop);
}

TEST_CASE("the limit cuts") {
  Simulation simulation = plain(1);
  const Outcome outcome = simulate(simulation, Lots{{1}, {9, 10, 11}, 3, 10}, true);
  REQUIRE(outcome.spans.size() == 3);
  CHECK(outcome.tokens.at(0) == 29);
  CHECK(outcome.spans[0].reason == EndReason::kStop);
  CHECK(outcome.spans[1].reason == EndReason::kStop);
  CHECK(outcome.spans[2].reason == EndReason::kLength);
}

TEST_CASE("an overflow preempts the youngest, which is computed again") {
  Simulation simulation = plain(1);
  simulation.engines[0].kv_capacity = 30;
  // 10 + 10 tokens of prompts, one more each in a step: after 5 steps 30, after 6 too many.
  const Outcome outcome = simulate(simulation, Lots{{10}, {20, 20}, 2, 20});
  CHECK(outcome.preempted == 16);
  CHECK(outcome.prefilled == 36);
  CHECK(outcome.decoded == 40);
  const double kv = 2 * (10 * 20 + 190);
  const double expected = (20 + 14) * 4e-3 + 40 * 60e-6 + kv * 20e-9 + 36 * 20e-6;
  CHECK(outcome.seconds == doctest::Approx(expected).epsilon(1e-12));
}

TEST_CASE("an engine that is away does nothing, and nothing is lost") {
  Simulation simulation = plain(4);
  simulation.engines.assign(2, EngineModel{});
  simulation.outages = {{1, 0.01, 5}};
  const Lots lots{{1, 1, 1, 1}, {10, 10, 10, 10}, 1, 10};
  const Outcome outcome = simulate(simulation, lots, true);
  CHECK(outcome.tokens.at(0) == 40);
  CHECK(outcome.ledger.requeued == 2);
  CHECK(outcome.busy[1] == doctest::Approx(0.01).epsilon(1e-12));
  // Of its third step nothing came.
  CHECK(outcome.decoded == 40 + 2 * 2);
  CHECK(std::count_if(outcome.spans.begin(), outcome.spans.end(), [](const Span& span) {
          return span.engine == 1 && span.reason == EndReason::kFailed;
        }) == 2);
  simulation.engines.resize(1);
  simulation.outages = {{0, 0.01, 5}};
  CHECK(simulate(simulation, lots).seconds > 5);
}

TEST_CASE("the same again gives the same; other lengths do not") {
  Random random(12);
  const Simulation simulation = random_simulation(random);
  Lots lots = random_lots(random, 800);
  const Outcome first = simulate(simulation, lots);
  expect_equal(simulate(simulation, lots), first);
  lots.lengths[0] += lots.lengths[0] < lots.limit ? 1 : -1;
  CHECK(simulate(simulation, lots).digest != first.digest);
}

TEST_CASE("what makes no sense is refused") {
  const Lots lots{{10}, {5}, 1, 10};
  const auto refused = [&](std::initializer_list<const char*> words, const auto& change) {
    Simulation simulation = plain(1);
    Lots changed = lots;
    change(simulation, changed);
    test::expect_error(ErrorCode::kScheduler, words, [&] { (void)simulate(simulation, changed); });
  };
  refused({"0 engines"}, [](Simulation& s, Lots&) { s.engines.clear(); });
  refused({"engine 0", "step is 0"}, [](Simulation& s, Lots&) { s.engines[0].step = 0; });
  refused({"step is nan"}, [](Simulation& s, Lots&) { s.engines[0].step = NAN; });
  refused({"a cost is -1"}, [](Simulation& s, Lots&) { s.engines[0].kv_token = -1; });
  refused({"more than a day"}, [](Simulation& s, Lots&) { s.engines[0].kv_token = 1; });
  refused({"kv_capacity is 0"}, [](Simulation& s, Lots&) { s.engines[0].kv_capacity = 0; });
  refused({"max_sequences is 0"}, [](Simulation& s, Lots&) { s.engines[0].max_sequences = 0; });
  refused({"iterations is 0"}, [](Simulation& s, Lots&) { s.iterations = 0; });
  refused({"train_token is inf"}, [](Simulation& s, Lots&) { s.train_token = INFINITY; });
  refused({"report_interval is 1e-09"}, [](Simulation& s, Lots&) { s.report_interval = 1e-9; });
  refused({"report_interval is 3", "lease_timeout"}, [](Simulation& s, Lots&) {
    s.report_interval = 3;
    s.config.lease_timeout = 3'000'000;
  });
  refused({"engine 3", "1 engines"}, [](Simulation& s, Lots&) { s.outages = {{3, 0, 1}}; });
  refused({"from 2 to 1"}, [](Simulation& s, Lots&) { s.outages = {{0, 2, 1}}; });
  refused({"overlap"}, [](Simulation& s, Lots&) { s.outages = {{0, 0, 2}, {0, 1, 3}}; });
  refused({"groups"}, [](Simulation& s, Lots&) { s.config.groups = 0; });
  refused({"samples is 0"}, [](Simulation&, Lots& l) { l.samples = 0; });
  refused({"no groups"}, [](Simulation&, Lots& l) { l.prompt_tokens.clear(); });
  refused({"1 lengths for 2 groups", "give 2"},
          [](Simulation&, Lots& l) { l.prompt_tokens = {1, 1}; });
  refused({"length 0 is 0"}, [](Simulation&, Lots& l) { l.lengths[0] = 0; });
  refused({"prompt of group 0"}, [](Simulation&, Lots& l) { l.prompt_tokens[0] = 0; });
  refused({"limit is 0"}, [](Simulation&, Lots& l) { l.limit = 0; });
  refused({"sample 0 of group 0", "15 tokens", "engine 0 holds 14"},
          [](Simulation& s, Lots&) { s.engines[0].kv_capacity = 14; });
  refused({"wants 1 more groups", "1 of 1 were offered"},
          [](Simulation& s, Lots&) { s.iterations = 2; });
  refused({"ten days"}, [](Simulation& s, Lots& l) {
    s.engines[0].step = 86000;
    s.config.lease_timeout = std::int64_t{1} << 60;
    l.limit = l.lengths[0] = 100;
  });
}
