// Sees a model that loops: exact periods, and near-repeats, token by token, O(1) amortised each, in
// memory that does not grow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace kimisys::rollout {

struct RepetitionConfig {
  std::int64_t max_period = 512;  // tokens; longer loops are not looked for
  std::int64_t min_tokens = 128;  // that a loop must cover before it counts
  std::int64_t min_repeats = 4;   // and how many times it must have come round
  double agreement = 0.9;         // share of tokens equal to those a period before; 1: exact only
};

struct Repetition {
  std::int64_t position = 0;  // tokens seen when it was found
  std::int64_t start = 0;     // of the loop, as a position
  std::int64_t period = 0;    // tokens
  double agreement = 0;       // measured
};

class RepetitionDetector {
 public:
  explicit RepetitionDetector(const RepetitionConfig& config = {});  // raises SchedulerError
  // Continues with more tokens; the first loop found, once. Afterwards it keeps that answer.
  const std::optional<Repetition>& feed(std::span<const std::int32_t> tokens);
  const std::optional<Repetition>& found() const;

 private:
  // The detector's own.
};

}  // namespace kimisys::rollout
