// How old a group may be when the trainer gets it, and what is done so that it is not older.
#pragma once

#include <cstdint>

#include "rollout/state.h"

namespace kimisys::rollout {

// Versions between the oldest token of something and the newest published. 0 where no token is.
std::int64_t age(const State& state, std::int64_t first_version);

// Older than the bound: it cannot be handed over any more, whatever the policy.
bool too_stale(const State& state, std::int64_t first_version);

// It may be handed over now and not after one more version.
bool last_chance(const State& state, std::int64_t first_version);

// Whether an iteration waits for unfinished groups that have their last chance.
bool waits(const Config& config);

// Most groups between their beginning and the trainer by kAdmission: as many as the batches hold
// that it will take before they grow too stale. `trains`: it has a batch whose version is still to
// come, so one chance fewer. kNever: no limit.
std::int64_t admission_limit(const Config& config, bool trains);

}  // namespace kimisys::rollout
