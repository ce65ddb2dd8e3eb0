#include "rollout/concurrency.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "policy_world.h"
#include "rollout/queue.h"
#include "rollout/scheduler_world.h"

using namespace kimisys::rollout;

TEST_CASE("concurrency: fixed counts sequences and nothing else") {
  PolicyWorld world;
  world.state.config.concurrency = Concurrency::kFixed;
  const Predictor predictor;
  const EngineId id = world.engine(1000, 3);
  const Slot group = world.group(4, 600);
  for (std::uint32_t s = 0; s < 3; ++s) {
    CHECK(has_room(world.state, predictor, world.state.engines[id], world.sample(group, 3)));
    world.run(world.sample(group, s), id);
  }
  CHECK_FALSE(has_room(world.state, predictor, world.state.engines[id], world.sample(group, 3)));
  CHECK(overflow(world.state, predictor, world.state.engines[id]).empty());
}

TEST_CASE("concurrency: one that fits nowhere is let onto an idle engine") {
  PolicyWorld world;
  const Predictor predictor;
  const EngineId id = world.engine(1000);
  const Slot huge = world.sample(world.group(1, 5000), 0);
  CHECK(has_room(world.state, predictor, world.state.engines[id], huge));
  world.run(world.sample(world.group(1, 10, 20), 0), id);
  CHECK_FALSE(has_room(world.state, predictor, world.state.engines[id], huge));
}

TEST_CASE("concurrency: the peak against sequences that end at random, step by step") {
  Draw draw(21);
  for (int round = 0; round < 20; ++round) {
    PolicyWorld world;
    const Predictor predictor;
    const EngineId id = world.engine(1 << 20, 1024);
    const int count = round % 4 == 0 ? 600 : 40;  // of very many, some stand for all
    for (int i = 0; i < count; ++i) {
      world.run(world.sample(world.group(1, 50 + draw.below(500)), 0), id, draw.below(4000));
    }
    const Slot more = world.sample(world.group(1), 0);
    struct Sequence {
      double context, rest;
    };
    std::vector<Sequence> sequences;
    const auto add = [&](Slot slot) {
      // Growth is followed as far as a typical length.
      sequences.push_back({static_cast<double>(world.state.context(slot)),
                           std::min(predictor.rest(world.state, slot), predictor.typical())});
    };
    for (const Slot slot : world.state.engines[id].leases) add(slot);
    add(more);
    // Each ends at a rate of one over its rest: the sum's expectation, at every step.
    double highest = 0;
    for (int time = 0; time < 32768; ++time) {
      double tokens = 0;
      for (const Sequence& one : sequences) {
        tokens += std::exp(-time / one.rest) * (one.context + time);
      }
      highest = std::max(highest, tokens);
    }
    CHECK(peak(world.state, predictor, world.state.engines[id], more) ==
          doctest::Approx(highest).epsilon(0.12));
    // Room is exactly where the peak, and what is held now, are below what is planned with.
    Engine& engine = world.state.engines[id];
    const double planned =
        std::max(peak(world.state, predictor, engine, more),
                 static_cast<double>(engine.kv_tokens + world.state.context(more)));
    engine.kv_capacity = static_cast<std::int64_t>(planned / world.state.config.kv_headroom) + 2;
    CHECK(has_room(world.state, predictor, engine, more));
    engine.kv_capacity -= 4;
    CHECK_FALSE(has_room(world.state, predictor, engine, more));
  }
}

TEST_CASE("concurrency: growth counts, not only what is held now") {
  PolicyWorld world;
  const Predictor predictor;
  const EngineId id = world.engine(3000);
  const Slot group = world.group(21, 10);
  for (std::uint32_t s = 0; s < 20; ++s) world.run(world.sample(group, s), id);
  const Engine& engine = world.state.engines[id];
  // 210 of 3,000 would be held at once, but the 21 are all expected to grow together.
  CHECK_FALSE(has_room(world.state, predictor, engine, world.sample(group, 20)));
  CHECK(peak(world.state, predictor, engine, kNoSlot) > 3000);
  for (Trajectory& trajectory : world.state.trajectories) trajectory.limit = 20;
  CHECK(has_room(world.state, predictor, engine, world.sample(group, 20)));
  CHECK(peak(world.state, predictor, Engine{}, kNoSlot) == 0);
}

TEST_CASE(
    "concurrency: an overflow pauses as few as suffice: the shortest, or the soonest to end") {
  Draw draw(22);
  for (int round = 0; round < 200; ++round) {
    PolicyWorld world;
    const Predictor predictor;
    world.state.config.token_budget = round % 2 == 0 ? 1 << 20 : 0;
    const auto rank = [&](Slot slot) {
      return by_potential(world.state.config) ? predictor.potential(world.state, slot)
                                              : static_cast<double>(world.state.context(slot));
    };
    const EngineId id = world.engine(10000 + draw.below(30000));
    const auto count = 1 + draw.below(30);
    for (int i = 0; i < count; ++i) {
      world.run(world.sample(world.group(1), 0), id, draw.below(3000));
    }
    const Engine& engine = world.state.engines[id];
    const std::vector<Slot> paused = overflow(world.state, predictor, engine);
    auto held = static_cast<double>(engine.kv_tokens);
    auto left = static_cast<double>(engine.sequences);
    const auto capacity = static_cast<double>(engine.kv_capacity);
    const auto safe = [&] { return capacity - std::min(64 * left, 0.02 * capacity); };
    double longest = 0;
    for (std::size_t i = 0; i < paused.size(); ++i) {
      CHECK(held > safe());  // each was needed
      held -= static_cast<double>(world.state.context(paused[i]));
      left -= 1;
      longest = std::max(longest, rank(paused[i]));
    }
    const bool last = paused.size() + 1 == engine.leases.size();
    CHECK((held <= safe() || last));
    for (const Slot slot : engine.leases) {
      if (std::find(paused.begin(), paused.end(), slot) != paused.end()) continue;
      CHECK(rank(slot) >= longest);
    }
    // Once asked to pause they are not asked again.
    for (const Slot slot : paused) world.state.trajectories[slot].phase = Phase::kPausing;
    CHECK(overflow(world.state, predictor, engine).empty());
  }
}

TEST_CASE("concurrency: what an engine says that it holds counts beside what was heard of") {
  Config config = test::budget(1 << 20);
  for (const Concurrency concurrency : {Concurrency::kKv, Concurrency::kFixed}) {
    config.concurrency = concurrency;
    const bool counts = concurrency == Concurrency::kKv;
    test::World world(config);
    world.join(0);  // its cache holds 2^20 tokens
    world.ready();
    world.offer(1, 2);
    world.offer(2);
    world.time();
    REQUIRE(world.leases.size() == 3);
    CHECK(world.stats(0, 33).empty());  // 3 prompts of 10 tokens, and 3 that are on their way
    CHECK(world.tokens(world.leases[0], 1).empty());
    CHECK(world.stats(0, 1 << 20).empty());
    CHECK(world.tokens(world.leases[0], 1) == (counts ? "pause e0 g1.1; pause e0 g2.0" : ""));
    if (!counts) continue;
    world.end(world.leases[1], EndReason::kPaused);
    world.end(world.leases[2], EndReason::kPaused);
    CHECK(world.leases.size() == 3);  // no room: they wait
    CHECK(world.stats(0, 12) == "start e0 g1.1 <100; start e0 g2.0 <100");
    // What an engine held is gone with its last sequence.
    world.stats(0, 1 << 20);
    for (const std::size_t one : {0U, 3U, 4U}) world.end(world.leases[one], EndReason::kStop, 1);
    world.offer(3, 2);
    world.offer(4, 2);
    world.time();
    CHECK(world.scheduler.counts().running == 4);
  }
}
