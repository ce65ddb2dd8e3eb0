// How many sequences an engine gets.
#pragma once

#include <vector>

#include "rollout/predict.h"
#include "rollout/state.h"

namespace kimisys::rollout {

// Whether the engine has room for one more: in sequences and, by kKv, in its KV cache as all that
// runs there grows for as long as it is predicted to. A trajectory that fits no engine even alone
// is let onto an idle one. O(1) for kFixed, O(sequences) at most for kKv.
bool has_room(const State& state, const Predictor& predictor, const Engine& engine,
              Slot trajectory);

// The most KV tokens that an engine is expected to hold at once, from now until all that runs there
// has ended, with `one_more` (kNoSlot: without). Sequences grow by a token a step, and end at a
// rate of one over their predicted rest: some are gone before others are long. O(sequences).
double peak(const State& state, const Predictor& predictor, const Engine& engine, Slot one_more);

// Trajectories to pause because the engine's cache is about to overflow: the engine would throw
// away KV that is dear to compute again. Empty for kFixed. O(1) where there is nothing to do.
std::vector<Slot> overflow(const State& state, const Predictor& predictor, const Engine& engine);

}  // namespace kimisys::rollout
