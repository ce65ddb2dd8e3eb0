#include "rollout/placement.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "policy_world.h"
#include "rollout/concurrency.h"

using namespace kimisys::rollout;

namespace {

// Engines with random loads, capacities and phases.
PolicyWorld loaded(Draw& draw) {
  PolicyWorld world;
  world.state.version = 3;
  for (int e = 0; e < 6; ++e) {
    const EngineId id = world.engine(5000 + draw.below(60000), 4 + draw.below(20));
    Engine& engine = world.state.engines[id];
    if (draw.below(8) == 0) engine.version = 2;
    if (draw.below(8) == 0) engine.phase = EnginePhase::kLeaving;
    const auto count = 1 + draw.below(6);
    for (int i = 0; i < count; ++i) {
      world.run(world.sample(world.group(1), 0), id, draw.below(6000));
    }
  }
  return world;
}

}  // namespace

TEST_CASE("placement: an engine that serves the newest version and has room, by each policy") {
  Draw draw(31);
  int placed = 0, refused = 0;
  for (int round = 0; round < 500; ++round) {
    PolicyWorld world = loaded(draw);
    const Predictor predictor;
    const Slot slot = world.sample(world.group(1, 100 + draw.below(20000)), 0);
    for (const Placement policy : {Placement::kGroupRoundRobin, Placement::kLeastLoaded,
                                   Placement::kKvAware, Placement::kSticky}) {
      world.state.config.placement = policy;
      const EngineId id = place(world.state, predictor, slot);
      if (id == kNoEngine) {
        ++refused;
        continue;
      }
      ++placed;
      const Engine& engine = world.state.engines[id];
      CHECK(engine.phase == EnginePhase::kServing);
      CHECK(engine.version == 3);
      CHECK(has_room(world.state, predictor, engine, slot));
    }
  }
  CHECK(placed > 100);
  CHECK(refused > 20);
}

TEST_CASE("placement: group round-robin sends a group to one engine, groups in turn") {
  PolicyWorld world;
  world.state.config.placement = Placement::kGroupRoundRobin;
  for (int e = 0; e < 3; ++e) world.engine();
  for (int g = 0; g < 7; ++g) {
    const Slot group = world.group(4);
    for (const Slot slot : world.state.groups[group].trajectories) {
      const EngineId id = place(world.state, Predictor(), slot);
      CHECK(id == static_cast<EngineId>(g % 3));
      world.run(slot, id);
    }
  }
  world.state.engines[1].phase = EnginePhase::kGone;
  CHECK(place(world.state, Predictor(), world.sample(world.group(1), 0)) == 2);  // 7 of {0, 2}
}

TEST_CASE("placement: least loaded and KV-aware against a scan of what they say") {
  Draw draw(32);
  for (int round = 0; round < 500; ++round) {
    PolicyWorld world = loaded(draw);
    const Predictor predictor;
    const Slot slot = world.sample(world.group(1, 100 + draw.below(9000)), 0);
    world.state.config.placement = Placement::kLeastLoaded;
    EngineId id = place(world.state, predictor, slot);
    for (const Engine& engine : world.state.engines) {
      if (!serves(world.state, engine)) continue;
      if (!has_room(world.state, predictor, engine, slot)) continue;
      REQUIRE(id != kNoEngine);
      CHECK(world.state.engines[id].sequences <= engine.sequences);
    }
    world.state.config.placement = Placement::kKvAware;
    id = place(world.state, predictor, slot);
    // The shortest steps; where that one's cache is full, of larger ones those that have room.
    const Engine* shortest = nullptr;
    const Engine* expected = nullptr;
    const auto less = [&](const Engine& engine, const Engine* other) {
      const Config& config = world.state.config;
      return other == nullptr || step_time(config, engine) < step_time(config, *other);
    };
    for (const Engine& engine : world.state.engines) {
      if (!serves(world.state, engine) || engine.sequences >= engine.max_sequences) continue;
      if (less(engine, shortest)) shortest = &engine;
    }
    for (const Engine& engine : world.state.engines) {
      if (!serves(world.state, engine) || shortest == nullptr) continue;
      if (!has_room(world.state, predictor, engine, slot)) continue;
      const bool may = has_room(world.state, predictor, *shortest, slot)
                           ? &engine == shortest
                           : engine.kv_capacity > shortest->kv_capacity;
      if (may && less(engine, expected)) expected = &engine;
    }
    CHECK(id == (expected == nullptr ? kNoEngine : expected->id));
  }
}

TEST_CASE("placement: sticky goes back, KV-aware goes where it is faster") {
  PolicyWorld world;
  const Predictor predictor;
  world.engine();
  world.engine();
  world.run(world.sample(world.group(1), 0), 0, 4000);
  const Slot slot = world.sample(world.group(1), 0);
  world.state.trajectories[slot].tokens = 500;
  world.state.trajectories[slot].engine = 0;
  CHECK(place(world.state, predictor, slot) == 1);
  world.state.config.placement = Placement::kSticky;
  CHECK(place(world.state, predictor, slot) == 0);
  world.state.engines[0].max_sequences = 1;
  CHECK(place(world.state, predictor, slot) == 1);  // it blocks nothing that waits behind it
  world.state.engines[0].phase = EnginePhase::kGone;
  CHECK(place(world.state, predictor, slot) == 1);
}

TEST_CASE("placement: a move only where the model says that it gains more than it costs") {
  Draw draw(33);
  int moved = 0;
  for (int round = 0; round < 500; ++round) {
    PolicyWorld world;
    world.state.config.prefill_cost = round % 2 == 0 ? 20 : 2000;
    const Predictor predictor;
    for (int e = 0; e < 4; ++e) {
      world.engine();
      const auto count = draw.below(8);
      for (int i = 0; i < count; ++i) {
        world.run(world.sample(world.group(1), 0), static_cast<EngineId>(e), draw.below(6000));
      }
    }
    for (const Slot slot : moves(world.state, predictor)) {
      ++moved;
      const Config& config = world.state.config;
      const Trajectory& trajectory = world.state.trajectories[slot];
      REQUIRE(trajectory.phase == Phase::kRunning);
      const auto context = static_cast<double>(world.state.context(slot));
      // It would run on the lightest engine, beside what is there.
      double there = 1e300;
      for (const Engine& engine : world.state.engines) {
        there = std::min(there, step_time(config, engine));
      }
      there += config.sequence_cost + config.kv_cost * context;
      const double here = step_time(config, world.state.engines[trajectory.engine]);
      CHECK(predictor.rest(world.state, slot) * (here - there) > config.prefill_cost * context);
    }
  }
  CHECK(moved > 50);
}

TEST_CASE("placement: nothing is moved to and fro") {
  Draw draw(34);
  for (int round = 0; round < 50; ++round) {
    PolicyWorld world;
    const Predictor predictor;
    for (int e = 0; e < 4; ++e) world.engine();
    for (int i = 0; i < 24; ++i) {
      world.run(world.sample(world.group(1), 0), 0, draw.below(6000));
    }
    int count = 0;
    for (auto wave = moves(world.state, predictor); !wave.empty() && count < 1000;
         wave = moves(world.state, predictor)) {
      for (const Slot slot : wave) {
        Engine& from = world.state.engines[world.state.trajectories[slot].engine];
        from.leases.erase(std::find(from.leases.begin(), from.leases.end(), slot));
        from.sequences -= 1;
        from.kv_tokens -= world.state.context(slot);
        const EngineId to = place(world.state, predictor, slot);
        REQUIRE(to != kNoEngine);
        CHECK(to != from.id);
        world.run(slot, to, world.state.trajectories[slot].tokens);
        ++count;
      }
    }
    CHECK(count >= 12);
    CHECK(count <= 24);  // nothing needs to move twice
    for (const Engine& engine : world.state.engines) CHECK(engine.sequences >= 3);
  }
}

TEST_CASE("placement: policies that move nothing, and nothing that pauses, move nothing") {
  PolicyWorld world;
  const Predictor predictor;
  world.engine();
  world.engine();
  for (int i = 0; i < 8; ++i) world.run(world.sample(world.group(1), 0), 0, 1000);
  CHECK_FALSE(moves(world.state, predictor).empty());
  for (const Placement policy :
       {Placement::kGroupRoundRobin, Placement::kLeastLoaded, Placement::kSticky}) {
    world.state.config.placement = policy;
    CHECK(moves(world.state, predictor).empty());
  }
  world.state.config.placement = Placement::kKvAware;
  // Of very many not all are looked at, so that one that pauses is counted.
  for (int i = 0; i < 200; ++i) world.run(world.sample(world.group(1), 0), 0, 1000);
  CHECK_FALSE(moves(world.state, predictor).empty());
  world.state.engines[0].pausing = 1;
  CHECK(moves(world.state, predictor).empty());
}

TEST_CASE("placement: an engine that takes a version is waited for, where it suits best") {
  for (const Placement policy :
       {Placement::kGroupRoundRobin, Placement::kLeastLoaded, Placement::kKvAware}) {
    PolicyWorld world;
    world.state.config.placement = policy;
    const Predictor predictor;
    for (int e = 0; e < 2; ++e) world.engine();
    world.state.engines[0].phase = EnginePhase::kUpdating;
    const Slot slot = world.sample(world.group(1), 0);  // group 0: engine 0, in turn
    // An idle one is not left to idle.
    CHECK(place(world.state, predictor, slot) == 1);
    world.run(world.sample(world.group(1), 0), 1);
    CHECK(place(world.state, predictor, slot) == kNoEngine);
    world.state.engines[0].phase = EnginePhase::kServing;
    CHECK(place(world.state, predictor, slot) == 0);
    // One that must drain first may take long.
    world.run(world.sample(world.group(1), 0), 0);
    world.state.engines[0].phase = EnginePhase::kUpdating;
    CHECK(place(world.state, predictor, slot) == 1);
  }
}

TEST_CASE("placement: what may yet take longer is yielded to, after a quantum") {
  PolicyWorld world;
  const Predictor predictor;
  const EngineId id = world.engine();
  const Slot running = world.sample(world.group(1), 0);
  const Slot fresh = world.sample(world.group(1), 0);
  Trajectory& trajectory = world.state.trajectories[running];
  world.run(running, id, 4000);
  CHECK_FALSE(yields(world.state, predictor, running, fresh));  // 4,096 are an eighth of its limit
  trajectory.tokens = 5000;
  REQUIRE(predictor.potential(world.state, running) < predictor.potential(world.state, fresh));
  CHECK(yields(world.state, predictor, running, fresh));
  CHECK_FALSE(yields(world.state, predictor, running, kNoSlot));
  // Not to what is sure to end sooner.
  world.state.trajectories[fresh].limit = 100;
  CHECK_FALSE(yields(world.state, predictor, running, fresh));
  world.state.trajectories[fresh].limit = 32768;
  // Continued, it runs for as long again as before.
  trajectory.segment_start = 5000;
  trajectory.tokens = 9990;
  CHECK_FALSE(yields(world.state, predictor, running, fresh));
  trajectory.tokens = 10000;
  CHECK(yields(world.state, predictor, running, fresh));
  // Only where all must finish, and by this order.
  for (const int field : {0, 1, 2, 3}) {
    Config config;
    if (field == 0) config.token_budget = 1000;
    if (field == 1) config.over_issue = 1.5;
    if (field == 2) config.order = Order::kFifo;
    if (field == 3) config.live_limit = 10;
    world.state.config = config;
    CHECK_FALSE(yields(world.state, predictor, running, fresh));
  }
  world.state.config = Config();
  trajectory.phase = Phase::kPausing;
  CHECK_FALSE(yields(world.state, predictor, running, fresh));
}

TEST_CASE("placement: a full small cache does not keep work from a larger one") {
  for (const Placement policy :
       {Placement::kLeastLoaded, Placement::kKvAware, Placement::kSticky}) {
    PolicyWorld world;
    world.state.config.placement = policy;
    const Predictor predictor;
    for (const std::int64_t capacity : {2000, 1 << 20, 1 << 20, 1 << 20}) world.engine(capacity);
    world.run(world.sample(world.group(1, 1900), 0), 0);
    for (const EngineId other : {1U, 2U, 3U}) {
      for (std::uint32_t i = 0; i < 10 + other % 3; ++i) {
        world.run(world.sample(world.group(1, 500), 0), other);
      }
    }
    const Slot slot = world.sample(world.group(1, 500), 0);
    REQUIRE_FALSE(has_room(world.state, predictor, world.state.engines[0], slot));
    CHECK(place(world.state, predictor, slot) == 3);
    for (const EngineId other : {1U, 2U, 3U}) world.state.engines[other].max_sequences = 1;
    CHECK(place(world.state, predictor, slot) == kNoEngine);
  }
}
