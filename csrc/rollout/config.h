// What a scheduler does is composed of named policies; this is the composition.
#pragma once

#include <array>
#include <cstdint>
#include <iosfwd>

namespace kimisys::rollout {

// kAlternate (hybrid deployment): engines and trainer take turns; between a batch and the next
// kTrainerReady nothing runs. kOverlap (disaggregated): engines go on.
enum class Deployment : std::uint32_t { kAlternate, kOverlap };

// Which engine a waiting trajectory goes to (placement.h).
// kGroupRoundRobin: all of a group to one engine, groups in turn. kLeastLoaded: the engine with the
// fewest sequences. kKvAware: by what the engines' KV caches will hold, moving a trajectory that
// has begun only where that gains more time than computing its KV again costs. kSticky: as
// kKvAware, but what has begun on an engine stays there while that has room.
enum class Placement : std::uint32_t { kGroupRoundRobin, kLeastLoaded, kKvAware, kSticky };

// Which waiting trajectory goes first (queue.h); what has begun goes before what has not.
// kFifo: as offered. kLongestFirst: longest predicted rest first. kProbeFirst: one sample of each
// group before the others, whose length its siblings are then predicted from, longest first. In
// iterations that end when everything has finished (no token_budget, over_issue or live_limit) the
// others go by what they may yet take at the most, begun or not, and what runs yields to them.
enum class Order : std::uint32_t { kFifo, kLongestFirst, kProbeFirst };

// What happens to a group that would grow too stale (staleness.h). kWait: its iteration does not
// end without it. kDrop: it is dropped. kAdmission: as kWait, and groups are admitted only as far
// as the trainer can take them in time by its count, so that waiting is rare.
enum class Staleness : std::uint32_t { kWait, kDrop, kAdmission };

// How many sequences an engine gets (concurrency.h). kFixed: max_sequences. kKv: as many as its KV
// cache will hold as they grow.
enum class Concurrency : std::uint32_t { kFixed, kKv };

// What a new version does to segments that run. kInterrupt: they are paused, and go on under it.
// kDrain: they end first.
enum class Update : std::uint32_t { kInterrupt, kDrain };

// Their names, by value: what Python, traces and messages spell.
inline constexpr std::array kDeployments = {"alternate", "overlap"};
inline constexpr std::array kPlacements = {"group_round_robin", "least_loaded", "kv_aware",
                                           "sticky"};
inline constexpr std::array kOrders = {"fifo", "longest_first", "probe_first"};
inline constexpr std::array kStalenesses = {"wait", "drop", "admission"};
inline constexpr std::array kConcurrencies = {"fixed", "kv"};
inline constexpr std::array kUpdates = {"interrupt", "drain"};

struct Config {
  Deployment deployment = Deployment::kAlternate;
  Placement placement = Placement::kKvAware;
  Order order = Order::kProbeFirst;
  Staleness staleness = Staleness::kWait;
  Concurrency concurrency = Concurrency::kKv;
  Update update = Update::kInterrupt;

  // An iteration ends when `token_budget` output tokens were made in it (k1.5's partial rollouts;
  // the unfinished are paused and go first in the next), or, with 0, when `groups` are complete.
  std::int64_t token_budget = 0;
  // Groups in a batch. With a budget: at least one is handed over, whatever is complete beyond
  // `groups` waits for the next (0: no such limit).
  std::int64_t groups = 0;
  // Without a budget, this many times `groups` are begun; when `groups` are complete the rest are
  // paused and go first in the next iteration (APRIL).
  double over_issue = 1.0;
  // Most output tokens of a segment; 0: until its end, or the budget's.
  std::int64_t segment_tokens = 0;
  // Most trajectories that have begun and not ended, over all engines; 0: what the engines hold.
  std::int64_t live_limit = 0;
  // Versions between the oldest token of a group and the trainer's when the group is handed over;
  // negative: no bound.
  std::int64_t max_staleness = -1;

  std::int64_t lease_timeout = 120'000'000;  // microseconds without a word of a lease
  std::int64_t max_failures = 3;             // of one segment in a row, before its group is dropped

  // What placement weighs a move with: microseconds of an engine per prefilled token, per step, per
  // sequence and step, per KV token and step. Only their proportions matter.
  double prefill_cost = 20.0;
  double step_cost = 4000.0;
  double sequence_cost = 60.0;
  double kv_cost = 0.02;
  double kv_headroom = 0.97;  // the share of an engine's KV cache that is planned with

  friend bool operator==(const Config&, const Config&) = default;
};

// Raises SchedulerError naming the first field that makes no sense, or that contradicts another.
void check(const Config& config);

std::ostream& operator<<(std::ostream& stream, const Config& config);

}  // namespace kimisys::rollout
