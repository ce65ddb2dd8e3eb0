#include "rollout/placement.h"

#include <algorithm>

#include "rollout/concurrency.h"

namespace kimisys::rollout {
namespace {

// All of a group to one engine, groups in turn; where that has no room, to the next that has.
EngineId place_group(const State& state, const Predictor& predictor, Slot trajectory) {
  std::vector<const Engine*> turn;
  for (const Engine& engine : state.engines) {
    if (serves(state, engine)) turn.push_back(&engine);
  }
  const std::uint64_t number = state.group_of(trajectory).number;
  for (std::size_t i = 0; i < turn.size(); ++i) {
    const Engine& engine = *turn[(number + i) % turn.size()];
    if (has_room(state, predictor, engine, trajectory)) return engine.id;
  }
  return kNoEngine;
}

EngineId place_least_loaded(const State& state, const Predictor& predictor, Slot trajectory) {
  const Engine* best = nullptr;
  for (const Engine& engine : state.engines) {
    if (!serves(state, engine)) continue;
    if (best != nullptr && engine.sequences >= best->sequences) continue;
    if (has_room(state, predictor, engine, trajectory)) best = &engine;
  }
  return best == nullptr ? kNoEngine : best->id;
}

}  // namespace

bool serves(const State& state, const Engine& engine) {
  return engine.phase == EnginePhase::kServing && engine.version >= state.version;
}

double step_time(const Config& config, const Engine& engine) {
  return config.step_cost + config.sequence_cost * static_cast<double>(engine.sequences) +
         config.kv_cost * static_cast<double>(engine.kv_tokens);
}

EngineId place(const State& state, const Predictor& predictor, Slot trajectory) {
  switch (state.config.placement) {
    case Placement::kGroupRoundRobin:
      return place_group(state, predictor, trajectory);
    case Placement::kLeastLoaded:
      return place_least_loaded(state, predictor, trajectory);
    case Placement::kKvAware:
    case Placement::kSticky:
      break;
  }
  return place_kv(state, predictor, trajectory);
}

}  // namespace kimisys::rollout
