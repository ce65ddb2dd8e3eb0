#include "rollout/budget.h"

#include <algorithm>

namespace kimisys::rollout {

bool budget_reached(const Config& config, std::int64_t spent) {
  return config.token_budget > 0 && spent >= config.token_budget;
}

std::int64_t segment_limit(const State& state, const Trajectory& trajectory, std::int64_t spent) {
  const Config& config = state.config;
  std::int64_t limit = trajectory.limit - trajectory.tokens;
  if (config.segment_tokens > 0) limit = std::min(limit, config.segment_tokens);
  // Beyond the budget an iteration goes on only for groups that it must not end without.
  const bool stops = config.token_budget > 0 && config.deployment == Deployment::kAlternate;
  if (stops && spent < config.token_budget) limit = std::min(limit, config.token_budget - spent);
  return limit;
}

}  // namespace kimisys::rollout
