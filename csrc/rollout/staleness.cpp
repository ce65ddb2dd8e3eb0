#include "rollout/staleness.h"

#include <algorithm>

namespace kimisys::rollout {

std::int64_t age(const State& state, std::int64_t first_version) {
  if (first_version == kNoVersion) return 0;
  return std::max<std::int64_t>(0, state.version - first_version);
}

bool too_stale(const State& state, std::int64_t first_version) {
  const std::int64_t bound = state.config.max_staleness;
  return bound >= 0 && age(state, first_version) > bound;
}

bool last_chance(const State& state, std::int64_t first_version) {
  const std::int64_t bound = state.config.max_staleness;
  return bound >= 0 && first_version != kNoVersion && age(state, first_version) >= bound;
}

bool waits(const Config& config) {
  return config.max_staleness >= 0 && config.staleness != Staleness::kDrop;
}

std::int64_t admission_limit(const Config& config, bool trains) {
  if (config.staleness != Staleness::kAdmission) return kNever;
  const std::int64_t batches = config.max_staleness + (trains ? 0 : 1);
  // Both factors can be large; what cannot be reached anyway is no limit.
  if (batches > kNever / config.groups) return kNever;
  return batches * config.groups;
}

}  // namespace kimisys::rollout
