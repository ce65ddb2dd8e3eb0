// The distribution of lengths, from those that finished and those still running: a life table
// (Kaplan and Meier's estimate by the actuarial method) over buckets of equal ratio. What runs
// counts as "at least this long", or the lengths seen first, the short ones, would mislead.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kimisys::rollout {

class Survival {
 public:
  static constexpr std::size_t kBuckets = 296;  // eight an octave, up to 2^39 tokens

  Survival();

  // A trajectory ended, `tokens` long; `cut`: by its limit, it would have gone on. O(1).
  void add(std::int64_t tokens, bool cut);

  // How long those are that have not ended, from the beginning: clear, then one call each, then
  // refresh(). Estimates are as of the last refresh(). O(buckets) besides the calls.
  void clear_running();
  void add_running(std::int64_t tokens);
  void refresh();

  // Old lengths count half from now on: a policy in training changes how long it answers.
  void halve();

  // The probability that a length is above `tokens`.
  double above(double tokens) const;

  // E[min(length, limit) - tokens | length > tokens], tokens to come; 0 when at the limit.
  double rest(double tokens, double limit) const;

  double log_mean() const { return log_mean_; }          // of ln(length)
  double log_variance() const { return log_variance_; }  // of ln(length)
  double ended() const { return total_; }                // how many were added, old ones for less

  static std::size_t bucket(std::int64_t tokens);
  static double lower(std::size_t bucket);  // its least number of tokens

 private:
  double integral(double tokens) const;  // of above() from `tokens` on

  std::array<double, kBuckets> ended_ = {};    // by the bucket that they ended in
  std::array<double, kBuckets> cut_ = {};      // cut off in it
  std::array<double, kBuckets> running_ = {};  // running in it
  std::array<double, kBuckets + 1> above_ = {};
  std::array<double, kBuckets + 1> integral_ = {};
  double total_ = 0;
  double log_mean_ = 0;
  double log_variance_ = 0;
};

}  // namespace kimisys::rollout
