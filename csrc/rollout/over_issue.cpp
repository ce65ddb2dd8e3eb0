#include "rollout/over_issue.h"

#include <cmath>

#include "rollout/types.h"

namespace kimisys::rollout {

std::int64_t issue_limit(const Config& config) {
  if (config.token_budget > 0) return kNever;
  if (config.deployment == Deployment::kOverlap && config.staleness == Staleness::kAdmission) {
    return kNever;
  }
  if (config.over_issue == 1) return config.groups;
  const double limit = std::ceil(config.over_issue * static_cast<double>(config.groups));
  return limit < 1e18 ? static_cast<std::int64_t>(limit) : kNever;
}

}  // namespace kimisys::rollout
