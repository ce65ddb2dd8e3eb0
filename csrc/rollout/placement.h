// Which engine a waiting trajectory goes to, and which running one is worth moving.
#pragma once

#include <vector>

#include "rollout/predict.h"
#include "rollout/state.h"

namespace kimisys::rollout {

// An engine that serves, has room by concurrency.h and suits the policy, or kNoEngine: it waits.
// So it does where it suits best an engine that takes a version, unless one idles: the first that
// has would get all. O(engines).
EngineId place(const State& state, const Predictor& predictor, Slot trajectory);

// When nothing waits: running trajectories to pause because another engine would gain more by
// having them than computing their KV again costs. Empty for policies that move nothing. They are
// then placed by `place`. One at a time; O(engines).
std::vector<Slot> moves(const State& state, const Predictor& predictor);

// Whether a running trajectory is to be paused for `waiting`, the first of the queue, which may yet
// take longer: in iterations that end when everything has finished, after it has run for as long
// again as before and a typical length. Asked when a lease is heard of and something waits. O(1)
// until then, O(k) afterwards.
bool yields(const State& state, const Predictor& predictor, Slot running, Slot waiting);

// Microseconds of a step of the engine with what runs there.
double step_time(const Config& config, const Engine& engine);

// Whether an engine may be given work: it serves, and what is newest.
bool serves(const State& state, const Engine& engine);

// Whether it may be, or as soon as it has taken a version; one that must still drain may not.
bool will_serve(const State& state, const Engine& engine);

// `place` for kKvAware and kSticky: the engine whose steps are the shortest or, if it has no room,
// of those with a larger cache.
EngineId place_kv(const State& state, const Predictor& predictor, Slot trajectory);

}  // namespace kimisys::rollout
