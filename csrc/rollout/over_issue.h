// Over-issue with recycling (APRIL, arXiv 2509.18521): an iteration begins more groups than it
// hands over, so that it does not wait for the longest; those go first in the next.
#pragma once

#include <cstdint>

#include "rollout/config.h"

namespace kimisys::rollout {

// Most groups between their beginning and the trainer in iterations without a budget: over_issue
// times `groups`, rounded up. kNever where something else limits: a budget, or admission by count
// in a deployment whose engines do not stop for the trainer.
std::int64_t issue_limit(const Config& config);

}  // namespace kimisys::rollout
