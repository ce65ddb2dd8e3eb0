#include "rollout/predict.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "policy_world.h"
#include "rollout/survival.h"

using namespace kimisys::rollout;

namespace {

std::int64_t lognormal(Draw& draw, double median, double sigma, double shared = 0) {
  return std::max<std::int64_t>(
      1, static_cast<std::int64_t>(median * std::exp(sigma * draw.normal() + shared)));
}

// Finishes `groups` groups of `samples`, whose logarithms correlate by `correlation`.
Predictor taught(PolicyWorld& world, Draw& draw, int groups, std::uint32_t samples,
                 double correlation) {
  Predictor predictor;
  for (int g = 0; g < groups; ++g) {
    const Slot group = world.group(samples);
    const double shared = std::sqrt(correlation) * draw.normal();
    for (std::uint32_t s = 0; s < samples; ++s) {
      const Slot slot = world.sample(group, s);
      world.finish(slot, lognormal(draw, 2000, std::sqrt(1 - correlation), shared));
      predictor.finished(world.state, slot);
    }
  }
  return predictor;
}

}  // namespace

TEST_CASE("survival: buckets are contiguous, eight an octave") {
  for (std::size_t b = 0; b + 1 < Survival::kBuckets; ++b) {
    const auto low = static_cast<std::int64_t>(Survival::lower(b));
    const auto next = static_cast<std::int64_t>(Survival::lower(b + 1));
    REQUIRE(low < next);
    CHECK(Survival::bucket(low) == b);
    CHECK(Survival::bucket(next - 1) == b);
    if (b >= 8) CHECK(static_cast<double>(next) / static_cast<double>(low) <= 1.125);
  }
  CHECK(Survival::bucket(-5) == 0);
  CHECK(Survival::bucket(INT64_MAX) == Survival::kBuckets - 1);
}

TEST_CASE("survival: what is expected of seen lengths is what their sample says") {
  Draw draw(1);
  Survival survival;
  std::vector<double> lengths;
  for (int i = 0; i < 20000; ++i) {
    lengths.push_back(static_cast<double>(lognormal(draw, 2000, 1)));
    survival.add(static_cast<std::int64_t>(lengths.back()), false);
  }
  survival.refresh();
  for (const double age : {0.0, 300.0, 2000.0, 8000.0}) {
    for (const double limit : {4000.0, 32768.0}) {
      if (age >= limit) continue;
      double sum = 0, count = 0;
      for (const double length : lengths) {
        if (length <= age) continue;
        sum += std::min(length, limit) - age;
        count += 1;
      }
      CHECK(survival.rest(age, limit) == doctest::Approx(sum / count).epsilon(0.03));
      CHECK(survival.above(age) == doctest::Approx(count / 20000).epsilon(0.03));
    }
  }
  CHECK(survival.log_mean() == doctest::Approx(std::log(2000)).epsilon(0.01));
  CHECK(survival.log_variance() == doctest::Approx(1).epsilon(0.05));
  CHECK(survival.rest(5000, 5000) == 0);
}

TEST_CASE("survival: what runs counts, or the short ones that end first would mislead") {
  // All begin at once; at 1,500 tokens those that are shorter have ended and the rest run.
  Draw draw(2);
  Survival told, misled;
  double sum = 0;
  for (int i = 0; i < 4000; ++i) {
    const std::int64_t length = lognormal(draw, 2000, 1);
    sum += static_cast<double>(std::min<std::int64_t>(length, 1500));
    if (length <= 1500) {
      told.add(length, false);
      misled.add(length, false);
    } else {
      told.add_running(1500);
    }
  }
  told.refresh();
  misled.refresh();
  CHECK(told.rest(0, 1500) == doctest::Approx(sum / 4000).epsilon(0.03));
  CHECK(misled.rest(0, 1500) < 0.85 * sum / 4000);
}

TEST_CASE("survival: beyond the longest seen the tail goes on") {
  Survival survival;
  for (int i = 0; i < 1000; ++i) survival.add(1000 + i, i % 2 == 0 && i > 900);
  survival.refresh();
  CHECK(survival.rest(4000, 1e6) > 4000);
  CHECK(survival.rest(100000, 1e6) > 50000);
  CHECK(survival.rest(1e6 - 10, 1e6) <= 10);
  // Nothing seen: at least something is expected, more of the older, never beyond the limit.
  const Survival empty;
  CHECK(empty.rest(0, 32768) > 100);
  CHECK(empty.rest(8000, 32768) > empty.rest(1000, 32768));
  CHECK(empty.rest(32760, 32768) <= 8);
}

TEST_CASE("survival: old lengths fade") {
  Survival survival;
  for (int i = 0; i < 1000; ++i) survival.add(1000, false);
  for (int i = 0; i < 10; ++i) survival.halve();
  for (int i = 0; i < 1000; ++i) survival.add(8000, false);
  survival.refresh();
  CHECK(survival.rest(0, 32768) > 7000);
}

TEST_CASE("predict: the correlation of siblings is found") {
  for (const double correlation : {0.0, 0.5, 0.8}) {
    PolicyWorld world;
    Draw draw(3);
    const Predictor predictor = taught(world, draw, 400, 8, correlation);
    CHECK(predictor.correlation() == doctest::Approx(correlation).epsilon(0.1).scale(1));
  }
}

TEST_CASE("predict: few groups are no proof of correlation") {
  PolicyWorld world;
  Draw draw(4);
  CHECK(taught(world, draw, 1, 8, 0.9).correlation() < 0.12);
}

TEST_CASE("predict: finished siblings tell what to expect, against a Monte Carlo") {
  PolicyWorld world;
  Draw draw(5);
  const double correlation = 0.8;
  const Predictor predictor = taught(world, draw, 400, 8, correlation);
  const Slot group = world.group(3);
  world.finish(world.sample(group, 0), 9000);
  world.finish(world.sample(group, 1), 9000);
  const Slot asked = world.sample(group, 2);
  for (const std::int64_t age : {0, 3000, 9000}) {
    world.state.trajectories[asked].tokens = age;
    // The posterior of the group's mean given two lengths, then a length given that.
    const double weight = 2 * correlation / (1 + correlation);
    const double mean = weight * std::log(9000.0 / 2000);
    double sum = 0, count = 0;
    for (int i = 0; i < 200000; ++i) {
      const double length =
          2000 * std::exp(mean + std::sqrt(1 - correlation * weight) * draw.normal());
      if (length <= static_cast<double>(age)) continue;
      sum += std::min(length, 32768.0) - static_cast<double>(age);
      count += 1;
    }
    CHECK(predictor.rest(world.state, asked) == doctest::Approx(sum / count).epsilon(0.15));
  }
}

TEST_CASE("predict: a sibling that runs and has become long raises what is expected") {
  PolicyWorld world;
  Draw draw(6);
  const Predictor predictor = taught(world, draw, 400, 8, 0.8);
  const Slot group = world.group(2);
  world.engine();
  const double before = predictor.rest(world.state, world.sample(group, 1));
  world.run(world.sample(group, 0), 0, 300);
  CHECK(predictor.rest(world.state, world.sample(group, 1)) == before);
  world.state.trajectories[world.sample(group, 0)].tokens = 12000;
  CHECK(predictor.rest(world.state, world.sample(group, 1)) > 2 * before);
}

TEST_CASE("predict: siblings without correlation say nothing; at least 1, at most the limit") {
  PolicyWorld world;
  Draw draw(7);
  const Predictor predictor = taught(world, draw, 400, 8, 0);
  const Slot short_one = world.group(2), long_one = world.group(2);
  world.finish(world.sample(short_one, 0), 50);
  world.finish(world.sample(long_one, 0), 30000);
  const Slot asked = world.sample(short_one, 1);
  CHECK(predictor.rest(world.state, asked) ==
        predictor.rest(world.state, world.sample(long_one, 1)));
  world.state.trajectories[asked].tokens = 32768;
  CHECK(predictor.rest(world.state, asked) == 1);
  for (int i = 0; i < 1000; ++i) {
    world.state.trajectories[asked].tokens = draw.below(32768);
    world.state.trajectories[asked].limit =
        world.state.trajectories[asked].tokens + 1 + draw.below(1000);
    const double rest = predictor.rest(world.state, asked);
    CHECK(rest >= 1);
    CHECK(rest <= static_cast<double>(world.state.trajectories[asked].limit -
                                      world.state.trajectories[asked].tokens));
  }
}

TEST_CASE("predict: old lengths fade as a policy in training changes") {
  PolicyWorld world;
  Draw draw(8);
  Predictor predictor;
  const Slot group = world.group(1);
  const Slot slot = world.sample(group, 0);
  for (int i = 0; i < 20000; ++i) {
    world.finish(slot, i < 10000 ? 500 : 4000);
    predictor.finished(world.state, slot);
  }
  const Slot asked = world.sample(world.group(1), 0);
  CHECK(predictor.rest(world.state, asked) > 3000);
}

TEST_CASE("predict: an oracle that was revealed is believed") {
  PolicyWorld world;
  Predictor predictor;
  const Slot group = world.group(2, 100, 1000);
  predictor.reveal([&](GroupId id, std::uint32_t sample) {
    return id == world.state.groups[group].id ? 700 + 1000 * std::int64_t{sample} : 0;
  });
  world.state.trajectories[world.sample(group, 0)].tokens = 300;
  CHECK(predictor.rest(world.state, world.sample(group, 0)) == 400);
  CHECK(predictor.rest(world.state, world.sample(group, 1)) == 1000);  // its limit
}

TEST_CASE("predict: the potential is what next to nothing exceeds, and it is not much more") {
  PolicyWorld world;
  Draw draw(9);
  const Predictor predictor = taught(world, draw, 400, 8, 0);
  const Slot asked = world.sample(world.group(1, 100, 1 << 30), 0);
  int above = 0;
  for (int i = 0; i < 100000; ++i) {
    above +=
        static_cast<double>(lognormal(draw, 2000, 1)) > predictor.potential(world.state, asked);
  }
  CHECK(above == 0);
  const double far = std::log(predictor.potential(world.state, asked) / 2000);
  CHECK(far == doctest::Approx(5).epsilon(0.1));  // deviations of 1
  CHECK(predictor.typical() == doctest::Approx(2000).epsilon(0.1));
  // It falls by every token that is made, and near its end it is believed to double.
  const double whole = predictor.potential(world.state, asked);
  world.state.trajectories[asked].tokens = 1000;
  CHECK(predictor.potential(world.state, asked) == doctest::Approx(whole - 1000));
  world.state.trajectories[asked].tokens = 1000000;
  CHECK(predictor.potential(world.state, asked) == 1000000);
  world.state.trajectories[asked].limit = 1000100;
  CHECK(predictor.potential(world.state, asked) == 100);
}
