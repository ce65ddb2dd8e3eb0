// Sees a model that loops: exact periods, and near-repeats, token by token, O(1) amortised each, in
// memory that does not grow.
//
// The definition. For a period p the window is the last W = max(min_tokens, min_repeats * p)
// tokens; W - p of them have a token p before them in it. The text loops with period p when at
// least agreement * (W - p) of these equal it. A loop whose period itself changes, as where a
// counter grows by a digit, begins anew there.
//
// How it is found without looking at every period at every token. A window that loops has a run of
// equal tokens that is longer than some gram (pigeonhole), so the gram's last few places propose
// the period. A proposed period is counted backwards from the newest token and given up at the
// first mismatch too many; until that one has left the window the period cannot hold, so it is not
// counted again before. That loses nothing. Two things can: all grams of a loop lying more often
// than kPlaces times in its period, and more counting than kCredit tokens per token, which then
// comes some tokens late.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <queue>
#include <span>
#include <utility>
#include <vector>

namespace kimisys::rollout {

// The defaults are those at which `python -m bench.repetition` raised 0 to 2 alarms in a million
// tokens of prose, code, scratchpads, tables and logs; those were lists of near-equal lines.
struct RepetitionConfig {
  std::int64_t max_period = 512;  // tokens; longer loops are not looked for
  std::int64_t min_tokens = 512;  // that a loop must cover before it counts
  std::int64_t min_repeats = 6;   // and how many times it must have come round
  double agreement = 0.9;         // share of tokens equal to those a period before; 1: exact only

  friend bool operator==(const RepetitionConfig&, const RepetitionConfig&) = default;
};

// Raises SchedulerError naming the field that makes no sense.
void check(const RepetitionConfig& config);

struct Repetition {
  std::int64_t position = 0;  // tokens seen when it was found
  std::int64_t start = 0;     // of the loop, as a position
  std::int64_t period =
      0;                 // tokens; the shortest that holds; a multiple may hold a token before it
  double agreement = 0;  // measured, over the window
};

class RepetitionDetector {
 public:
  explicit RepetitionDetector(const RepetitionConfig& config = {});  // raises SchedulerError
  // Continues with more tokens; the first loop found, once. Afterwards it keeps that answer.
  const std::optional<Repetition>& feed(std::span<const std::int32_t> tokens);
  const std::optional<Repetition>& found() const { return found_; }
  const RepetitionConfig& config() const { return config_; }
  std::int64_t position() const { return position_; }  // tokens looked at

  static constexpr int kPlaces = 8;              // of a gram that are looked at
  static constexpr std::int64_t kCredit = 1024;  // tokens compared per token, in the long run

 private:
  using Due = std::pair<std::int64_t, std::int64_t>;  // position, period

  struct Candidate {
    std::int64_t proposed = -1;   // position at which a gram last proposed it
    std::int64_t not_before = 0;  // cannot hold before this position
    bool due = false;             // is in due_
  };

  void push(std::int32_t token);
  void propose();
  void consider(std::int64_t period);
  void count(std::int64_t period);
  void report(std::int64_t period);
  std::int64_t window(std::int64_t period) const;
  std::int64_t allowed(std::int64_t period) const;
  std::int64_t mismatches(std::int64_t period, std::int64_t bound, std::int64_t& looked_at) const;

  RepetitionConfig config_;
  std::int64_t gram_ = 1;               // tokens
  std::uint64_t hash_ = 0;              // of the last gram
  std::uint64_t leaving_ = 1;           // what the token that leaves a gram was multiplied by
  std::int64_t position_ = 0;           // tokens seen
  std::int64_t credit_ = 0;             // tokens that may be compared
  std::size_t history_ = 0;             // most tokens that are needed
  std::vector<std::int32_t> tokens_;    // the last ones, history_ at least once there were as many
  std::vector<std::uint32_t> last_;     // by hash: the low bits of the position of its last place
  std::vector<std::uint32_t> earlier_;  // by position: of the place before it
  std::vector<Candidate> candidates_;   // by period
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due_;
  std::optional<Repetition> found_;
};

}  // namespace kimisys::rollout
