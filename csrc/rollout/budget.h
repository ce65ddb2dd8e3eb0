// Partial rollouts after k1.5 (arXiv 2501.12599, section 2.6): an iteration makes a fixed number of
// output tokens; what is unfinished then goes on in the next.
#pragma once

#include <cstdint>

#include "rollout/state.h"

namespace kimisys::rollout {

// Whether an iteration that has made `spent` output tokens has reached its budget.
bool budget_reached(const Config& config, std::int64_t spent);

// Most new tokens of a trajectory's next segment, at least 1: what its own limit, the limit of
// segments and, where engines stop at the end of an iteration, the rest of the budget leave. The
// last never ends a segment early: a lease that makes all of the rest ends the iteration.
std::int64_t segment_limit(const State& state, const Trajectory& trajectory, std::int64_t spent);

}  // namespace kimisys::rollout
