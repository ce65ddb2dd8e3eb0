#include "rollout/config.h"

#include <cmath>
#include <ostream>

#include "base/error.h"

namespace kimisys::rollout {
namespace {

constexpr auto kCode = ErrorCode::kScheduler;
// Sums of anything that is bounded by it stay far from the end of 64 bits.
constexpr std::int64_t kMost = std::int64_t{1} << 60;

template <typename Choice>
void check_choice(const char* field, Choice choice, std::size_t choices) {
  const auto value = static_cast<std::size_t>(choice);
  KIMISYS_CHECK(value < choices, kCode, "config: ", field, " is ", value,
                ", which names none of its ", choices, " policies");
}

void check_range(const char* field, std::int64_t value, std::int64_t least) {
  KIMISYS_CHECK(value >= least && value <= kMost, kCode, "config: ", field, " is ", value,
                "; it must be from ", least, " to ", kMost);
}

void check_cost(const char* field, double value) {
  KIMISYS_CHECK(std::isfinite(value) && value >= 0, kCode, "config: ", field, " is ", value,
                "; a cost is a finite number of microseconds, not negative");
}

void check_staleness(const Config& config) {
  if (config.staleness != Staleness::kWait) {
    KIMISYS_CHECK(config.max_staleness >= 0, kCode, "config: staleness drops or counts, but ",
                  "max_staleness is ", config.max_staleness,
                  ", which is no bound; set it, or let staleness be wait");
  }
  if (config.staleness == Staleness::kAdmission) {
    KIMISYS_CHECK(config.groups > 0, kCode, "config: admission counts what the trainer takes, but ",
                  "groups, the size of its batch, is 0; set it, or let staleness be wait");
  }
  KIMISYS_CHECK(config.deployment != Deployment::kOverlap || config.max_staleness != 0, kCode,
                "config: in overlap what engines make while the trainer trains is older by one ",
                "version when it is handed over; max_staleness 0 refuses all of it: set it to 1 ",
                "or more, or let the deployment alternate");
  KIMISYS_CHECK(
      config.over_issue <= 1 || config.max_staleness != 0 || config.staleness == Staleness::kDrop,
      kCode, "config: over_issue ", config.over_issue, " leaves groups for the next iteration, ",
      "where max_staleness 0 refuses them; let staleness be drop, or allow 1 version or more");
}

}  // namespace

void check(const Config& config) {
  check_choice("deployment", config.deployment, kDeployments.size());
  check_choice("placement", config.placement, kPlacements.size());
  check_choice("order", config.order, kOrders.size());
  check_choice("staleness", config.staleness, kStalenesses.size());
  check_choice("concurrency", config.concurrency, kConcurrencies.size());
  check_choice("update", config.update, kUpdates.size());
  check_range("token_budget", config.token_budget, 0);
  check_range("groups", config.groups, 0);
  check_range("segment_tokens", config.segment_tokens, 0);
  check_range("live_limit", config.live_limit, 0);
  check_range("lease_timeout", config.lease_timeout, 1);
  check_range("max_failures", config.max_failures, 1);
  KIMISYS_CHECK(config.max_staleness <= kMost, kCode, "config: max_staleness is ",
                config.max_staleness, "; more than ", kMost, " versions is no bound, use -1");
  KIMISYS_CHECK(config.token_budget > 0 || config.groups > 0, kCode,
                "config: token_budget and groups are both 0, so no iteration would end; set one");
  KIMISYS_CHECK(config.over_issue >= 1 && config.over_issue <= 1e6, kCode, "config: over_issue is ",
                config.over_issue, "; it must be from 1 to a million");
  KIMISYS_CHECK(config.over_issue == 1 || config.token_budget == 0, kCode, "config: over_issue is ",
                config.over_issue, " beside a token_budget, which keeps ",
                "engines full without it; leave one of them out");
  check_staleness(config);
  check_cost("prefill_cost", config.prefill_cost);
  check_cost("step_cost", config.step_cost);
  check_cost("sequence_cost", config.sequence_cost);
  check_cost("kv_cost", config.kv_cost);
  KIMISYS_CHECK(config.kv_headroom > 0 && config.kv_headroom <= 1, kCode, "config: kv_headroom is ",
                config.kv_headroom,
                "; it is the share of an engine's KV cache to plan with, above 0 and up to 1");
}

std::ostream& operator<<(std::ostream& stream, const Config& config) {
  return stream
         << "Config(deployment=" << kDeployments.at(static_cast<std::size_t>(config.deployment))
         << ", placement=" << kPlacements.at(static_cast<std::size_t>(config.placement))
         << ", order=" << kOrders.at(static_cast<std::size_t>(config.order))
         << ", staleness=" << kStalenesses.at(static_cast<std::size_t>(config.staleness))
         << ", concurrency=" << kConcurrencies.at(static_cast<std::size_t>(config.concurrency))
         << ", update=" << kUpdates.at(static_cast<std::size_t>(config.update))
         << ", token_budget=" << config.token_budget << ", groups=" << config.groups
         << ", over_issue=" << config.over_issue << ", segment_tokens=" << config.segment_tokens
         << ", live_limit=" << config.live_limit << ", max_staleness=" << config.max_staleness
         << ", lease_timeout=" << config.lease_timeout << ", max_failures=" << config.max_failures
         << ", prefill_cost=" << config.prefill_cost << ", step_cost=" << config.step_cost
         << ", sequence_cost=" << config.sequence_cost << ", kv_cost=" << config.kv_cost
         << ", kv_headroom=" << config.kv_headroom << ')';
}

}  // namespace kimisys::rollout
