#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "expect.h"
#include "rollout/bounds.h"
#include "rollout/offline.h"

using namespace kimisys;           // NOLINT: a test file
using namespace kimisys::rollout;  // NOLINT

namespace {

using Random = std::mt19937_64;

std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
}

EngineModel random_engine(Random& random, std::int64_t capacity, std::int64_t most) {
  EngineModel model;
  model.step = 1e-3 * static_cast<double>(between(random, 1, 9));
  model.sequence = 1e-5 * static_cast<double>(between(random, 0, 90));
  model.kv_token = 1e-6 * static_cast<double>(between(random, 0, 90));
  model.prefill_token = 1e-5 * static_cast<double>(between(random, 0, 30));
  model.kv_capacity = between(random, capacity, 4 * capacity);
  model.max_sequences = between(random, 1, most);
  return model;
}

std::vector<Output> random_outputs(Random& random, std::int64_t count, std::int64_t longest) {
  std::vector<Output> outputs;
  for (std::int64_t i = 0; i < count; ++i) {
    outputs.push_back({between(random, 1, longest), between(random, 1, longest)});
  }
  return outputs;
}

std::vector<std::uint32_t> all_of(const std::vector<Output>& outputs) {
  std::vector<std::uint32_t> list(outputs.size());
  std::iota(list.begin(), list.end(), 0U);
  return list;
}

struct Live {
  std::int64_t context, rest;
};

std::int64_t sum_of(const std::vector<Live>& live) {
  std::int64_t sum = 0;
  for (const Live& one : live) sum += one.context;
  return sum;
}

// Whether these never overflow if nothing is added: looked at token by token.
bool never_overflow(std::vector<Live> live, std::int64_t capacity) {
  while (!live.empty()) {
    if (sum_of(live) > capacity) return false;
    for (Live& one : live) ++one.context, --one.rest;
    std::erase_if(live, [](const Live& one) { return one.rest == 0; });
  }
  return true;
}

Ticks naive_time(const EngineModel& model, const std::vector<Output>& outputs,
                 const std::vector<std::uint32_t>& list, Admit admit) {
  const StepCosts costs(model);
  std::vector<Live> running;
  std::vector<Live> waiting;
  for (const std::uint32_t i : list) waiting.push_back({outputs[i].prompt, outputs[i].length});
  Ticks now = 0;
  while (!running.empty() || !waiting.empty()) {
    bool preempted = false;
    while (sum_of(running) > model.kv_capacity) {
      waiting.insert(waiting.begin(), running.back());
      running.pop_back();
      preempted = true;
    }
    CHECK_FALSE((preempted && admit == Admit::kHeld));
    while (!preempted && !waiting.empty() &&
           static_cast<std::int64_t>(running.size()) < model.max_sequences) {
      std::vector<Live> more = running;
      more.push_back(waiting.front());
      const bool room = admit == Admit::kHeld ? never_overflow(more, model.kv_capacity)
                                              : sum_of(more) <= model.kv_capacity;
      if (!room) break;
      now += costs.prefill_token * waiting.front().context;
      running = more;
      waiting.erase(waiting.begin());
    }
    now += costs.step;
    for (Live& one : running) {
      now += costs.sequence + costs.kv_token * one.context;
      ++one.context, --one.rest;
    }
    std::erase_if(running, [](const Live& one) { return one.rest == 0; });
  }
  return now;
}

// The optimum of one engine over all that it may run in each step, whatever that throws away.
class Optimum {
 public:
  Optimum(const EngineModel& model, std::vector<Output> outputs)
      : model_(model), costs_(model), outputs_(std::move(outputs)), made_(outputs_.size(), 0) {}

  Ticks time(unsigned resident = 0) {
    const auto key = std::pair(made_, resident);
    if (const auto known = known_.find(key); known != known_.end()) return known->second;
    bool any = false;
    Ticks best = kNoTicks;
    for (unsigned set = 1; set < 1U << outputs_.size(); ++set) {
      const Ticks step = step_time(set, resident);
      if (step == kNoTicks) continue;
      any = true;
      for (std::size_t i = 0; i < made_.size(); ++i) made_[i] += set >> i & 1U;
      best = std::min(best, step + time(set));
      for (std::size_t i = 0; i < made_.size(); ++i) made_[i] -= set >> i & 1U;
    }
    return known_[key] = any ? best : 0;
  }

 private:
  Ticks step_time(unsigned set, unsigned resident) const {
    std::int64_t kv = 0;
    std::int64_t count = 0;
    Ticks taken = costs_.step;
    for (std::size_t i = 0; i < made_.size(); ++i) {
      if ((set >> i & 1U) == 0) continue;
      if (made_[i] == outputs_[i].length) return kNoTicks;
      const std::int64_t context = outputs_[i].prompt + made_[i];
      kv += context;
      ++count;
      taken += costs_.sequence + costs_.kv_token * context;
      if ((resident >> i & 1U) == 0) taken += costs_.prefill_token * context;
    }
    return kv > model_.kv_capacity || count > model_.max_sequences ? kNoTicks : taken;
  }

  const EngineModel& model_;
  const StepCosts costs_;
  const std::vector<Output> outputs_;
  std::vector<std::int64_t> made_;
  std::map<std::pair<std::vector<std::int64_t>, unsigned>, Ticks> known_;
};

// The least makespan when each trajectory stays on one engine: `of` times a set on an engine.
template <typename Of>
Ticks best_split(std::size_t count, std::size_t engines, const Of& of) {
  std::vector<Ticks> best(std::size_t{1} << count, kNoTicks);
  for (unsigned set = 0; set < best.size(); ++set) best[set] = of(set, std::size_t{0});
  for (std::size_t e = 1; e < engines; ++e) {
    std::vector<Ticks> next(best.size(), kNoTicks);
    for (unsigned part = 0; part < best.size(); ++part) {
      const Ticks time = of(part, e);
      for (unsigned set = 0; set < best.size(); ++set) {
        if ((set & part) == part) next[set] = std::min(next[set], std::max(time, best[set ^ part]));
      }
    }
    best = next;
  }
  return best.back();
}

std::vector<std::uint32_t> members(unsigned set) {
  std::vector<std::uint32_t> list;
  for (std::uint32_t i = 0; set >> i != 0; ++i) {
    if ((set >> i & 1U) != 0) list.push_back(i);
  }
  return list;
}

struct Case {
  Simulation simulation;
  Lots lots;
  std::vector<Output> outputs;
};

Case random_case(Random& random, bool slack) {
  Case made;
  const std::int64_t count = between(random, 1, 4);
  made.outputs = random_outputs(random, count, 4);
  made.lots.samples = 1;
  made.lots.limit = 4;
  for (const Output& output : made.outputs) {
    made.lots.prompt_tokens.push_back(output.prompt);
    made.lots.lengths.push_back(output.length);
  }
  for (std::int64_t e = between(random, 1, 2); e > 0; --e) {
    made.simulation.engines.push_back(random_engine(random, slack ? 32 : 8, 4));
    if (slack) made.simulation.engines.back().max_sequences = 4;
  }
  made.simulation.config.groups = count;
  return made;
}

Ticks optimum(const Case& c) {
  return best_split(c.outputs.size(), c.simulation.engines.size(),
                    [&](unsigned set, std::size_t e) {
                      std::vector<Output> some;
                      for (const std::uint32_t i : members(set)) some.push_back(c.outputs[i]);
                      return Optimum(c.simulation.engines[e], some).time();
                    });
}

// The same over the schedules that the search looks at.
Ticks best_lists(const Case& c) {
  return best_split(
      c.outputs.size(), c.simulation.engines.size(), [&](unsigned set, std::size_t e) {
        std::vector<std::uint32_t> list = members(set);
        Ticks best = kNoTicks;
        do {
          for (const Admit admit : {Admit::kAtOnce, Admit::kHeld}) {
            best = std::min(best, list_time(c.simulation.engines[e], c.outputs, list, admit));
          }
        } while (std::next_permutation(list.begin(), list.end()));
        return best;
      });
}

void check_schedule(const Case& c, const OfflineSchedule& schedule) {
  std::set<std::uint32_t> seen;
  Ticks last = 0;
  for (std::size_t e = 0; e < schedule.lists.size(); ++e) {
    for (const std::uint32_t i : schedule.lists[e]) CHECK(seen.insert(i).second);
    last = std::max(
        last, naive_time(c.simulation.engines[e], c.outputs, schedule.lists[e], schedule.admit[e]));
  }
  CHECK(seen.size() == c.outputs.size());
  CHECK(schedule.seconds == seconds_of(last));
}

}  // namespace

TEST_CASE("a list takes as long as token by token") {
  Random random(1);
  int preempted = 0;
  for (int round = 0; round < 400; ++round) {
    const EngineModel model = random_engine(random, 60, 12);
    const std::vector<Output> outputs = random_outputs(random, between(random, 1, 24), 30);
    const std::vector<std::uint32_t> list = all_of(outputs);
    const Ticks held = list_time(model, outputs, list, Admit::kHeld);
    const Ticks at_once = list_time(model, outputs, list, Admit::kAtOnce);
    CHECK(held == naive_time(model, outputs, list, Admit::kHeld));
    CHECK(at_once == naive_time(model, outputs, list, Admit::kAtOnce));
    preempted += held != at_once;
  }
  CHECK(preempted > 100);  // the cases are hard enough
}

TEST_CASE("no schedule beats the bounds, and the search finds the best of its schedules") {
  Random random(2);
  int tight = 0;
  for (int round = 0; round < 300; ++round) {
    const bool slack = round % 2 == 0;
    const Case c = random_case(random, slack);
    const Bounds bound = bounds(c.simulation, c.lots);
    const double best = seconds_of(optimum(c));
    const Offline found = offline(c.simulation, c.lots, 3000, 7);
    check_schedule(c, found.iterations.at(0));
    CHECK(std::max(bound.area.at(0), bound.path.at(0)) <= best * (1 + 1e-12));
    CHECK(bound.seconds <= best * (1 + 1e-12));
    CHECK(found.iterations[0].seconds >= best);
    CHECK(found.iterations[0].seconds == seconds_of(best_lists(c)));
    if (slack) CHECK(found.iterations[0].seconds == best);
    tight += bound.seconds > 0.95 * best;
  }
  CHECK(tight > 20);  // and the bounds are worth something
}

TEST_CASE("the bounds of equal engines are the formulas") {
  Simulation simulation;
  simulation.engines.assign(4, EngineModel{});
  simulation.config.groups = 2;
  Lots lots{{100, 300}, {10, 20, 30, 9999}, 2, 1000};
  const Bounds found = bounds(simulation, lots);
  const double tokens = 10 + 20 + 30 + 1000;
  const double kv = 100 * 30 + 45 + 190 + 300 * 1030 + 435 + 499500;
  const double prefill = 100 * 2 + 300 * 2;
  const double area = 4e-3 * 1000 + 60e-6 * tokens + 20e-9 * kv + 20e-6 * prefill;
  CHECK(found.area.at(0) == doctest::Approx(area / 4).epsilon(1e-12));
  const double path = 1000 * (4e-3 + 60e-6) + 20e-9 * (300000 + 499500) + 20e-6 * 300;
  CHECK(found.path.at(0) == doctest::Approx(path).epsilon(1e-12));
}

TEST_CASE("what is not an iteration of its own groups has no bound") {
  Simulation simulation;
  simulation.engines.assign(1, EngineModel{});
  simulation.config.groups = 2;
  const Lots lots{{1, 1}, {1, 1}, 1, 1};
  CHECK(bounds(simulation, lots).area.size() == 1);
  simulation.iterations = 2;
  test::expect_error(ErrorCode::kScheduler, {"2 iterations of 2 groups", "more groups"},
                     [&] { (void)bounds(simulation, lots); });
  simulation.iterations = 1;
  simulation.config.over_issue = 1.5;
  test::expect_error(ErrorCode::kScheduler, {"over_issue 1"},
                     [&] { (void)bounds(simulation, lots); });
  simulation.config.over_issue = 1;
  test::expect_error(ErrorCode::kScheduler, {"evaluations is -1"},
                     [&] { (void)offline(simulation, lots, -1); });
  // 100 steps of a day are more than ticks can count.
  simulation.engines[0].step = 80'000;
  test::expect_error(ErrorCode::kScheduler, {"iteration 1 of 1", "ten days"},
                     [&] { (void)offline(simulation, Lots{{1, 1}, {100, 1000}, 1, 1000}, 10); });
}

TEST_CASE("equal arguments give equal schedules, and more evaluations no worse ones") {
  Random random(3);
  Simulation simulation;
  simulation.engines.assign(4, random_engine(random, 2000, 16));
  simulation.config.groups = 25;
  simulation.iterations = 2;
  Lots lots;
  lots.samples = 4;
  lots.limit = 400;
  for (int group = 0; group < 50; ++group) lots.prompt_tokens.push_back(between(random, 1, 50));
  for (int sample = 0; sample < 200; ++sample) lots.lengths.push_back(between(random, 1, 500));
  const Offline none = offline(simulation, lots, 0, 5);
  const Offline first = offline(simulation, lots, 1000, 5);
  const Offline again = offline(simulation, lots, 1000, 5);
  CHECK(none.evaluations == 0);
  CHECK(first.evaluations < 2 * 1010);
  CHECK(first.seconds < none.seconds);
  CHECK(first.seconds == again.seconds);
  CHECK(first.iterations[1].lists == again.iterations[1].lists);
  CHECK(first.seconds > bounds(simulation, lots).seconds);
}
