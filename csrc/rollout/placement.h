// Which engine a waiting trajectory goes to, and which running one is worth moving.
#pragma once

#include <vector>

#include "rollout/predict.h"
#include "rollout/state.h"

namespace kimisys::rollout {

// An engine that serves, has room by concurrency.h and suits the policy, or kNoEngine: it waits.
// O(engines).
EngineId place(const State& state, const Predictor& predictor, Slot trajectory);

// When nothing waits: running trajectories to pause because another engine would gain more by
// having them than computing their KV again costs. Empty for policies that move nothing. They are
// then placed by `place`. O(engines) where there is nothing to do.
std::vector<Slot> moves(const State& state, const Predictor& predictor);

// Microseconds of a step of the engine with what runs there.
double step_time(const Config& config, const Engine& engine);

// Whether an engine may be given work: it serves, and what is newest.
bool serves(const State& state, const Engine& engine);

// `place` for kKvAware and kSticky: the engine whose steps are the shortest.
EngineId place_kv(const State& state, const Predictor& predictor, Slot trajectory);

}  // namespace kimisys::rollout
