#include "rollout/placement.h"

#include <algorithm>

#include "rollout/concurrency.h"
#include "rollout/queue.h"

namespace kimisys::rollout {
namespace {

constexpr double kLeastQuantum = 1.0 / 8;  // of the limit

// All of a group to one engine, groups in turn; where that has no room, to the next that has.
EngineId place_group(const State& state, const Predictor& predictor, Slot trajectory) {
  std::vector<const Engine*> turn;
  for (const Engine& engine : state.engines) {
    if (will_serve(state, engine)) turn.push_back(&engine);
  }
  const std::uint64_t number = state.group_of(trajectory).number;
  for (std::size_t i = 0; i < turn.size(); ++i) {
    const Engine& engine = *turn[(number + i) % turn.size()];
    if (!serves(state, engine)) return kNoEngine;
    if (has_room(state, predictor, engine, trajectory)) return engine.id;
  }
  return kNoEngine;
}

EngineId place_least_loaded(const State& state, const Predictor& predictor, Slot trajectory) {
  const Engine* best = nullptr;
  for (const Engine& engine : state.engines) {
    if (!will_serve(state, engine)) continue;
    if (best != nullptr && engine.sequences >= best->sequences) continue;
    if (has_room(state, predictor, engine, trajectory)) best = &engine;
  }
  return best == nullptr || !serves(state, *best) ? kNoEngine : best->id;
}

}  // namespace

bool serves(const State& state, const Engine& engine) {
  return engine.phase == EnginePhase::kServing && engine.version >= state.version;
}

bool will_serve(const State& state, const Engine& engine) {
  return serves(state, engine) || (engine.phase == EnginePhase::kUpdating && engine.sequences == 0);
}

double step_time(const Config& config, const Engine& engine) {
  return config.step_cost + config.sequence_cost * static_cast<double>(engine.sequences) +
         config.kv_cost * static_cast<double>(engine.kv_tokens);
}

bool yields(const State& state, const Predictor& predictor, Slot running, Slot waiting) {
  if (waiting == kNoSlot || !by_potential(state.config)) return false;
  const Trajectory& one = state.trajectories[running];
  const auto run = static_cast<double>(one.tokens - one.segment_start);
  if (run < static_cast<double>(one.segment_start) || one.phase != Phase::kRunning) return false;
  // The pause costs KV that is computed again: it must be small against what was done with it.
  if (run < std::max(predictor.typical(), kLeastQuantum * static_cast<double>(one.limit))) {
    return false;
  }
  return predictor.potential(state, running) < predictor.potential(state, waiting);
}

EngineId place(const State& state, const Predictor& predictor, Slot trajectory) {
  EngineId engine = kNoEngine;
  switch (state.config.placement) {
    case Placement::kGroupRoundRobin:
      engine = place_group(state, predictor, trajectory);
      break;
    case Placement::kLeastLoaded:
      engine = place_least_loaded(state, predictor, trajectory);
      break;
    case Placement::kKvAware:
    case Placement::kSticky:
      engine = place_kv(state, predictor, trajectory);
      break;
  }
  if (engine != kNoEngine) return engine;
  // It may wait for a better engine, but none idles meanwhile.
  for (const Engine& idle : state.engines) {
    if (serves(state, idle) && idle.sequences == 0) return idle.id;
  }
  return kNoEngine;
}

}  // namespace kimisys::rollout
