#include "rollout/survival.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace kimisys::rollout {
namespace {

constexpr std::size_t kExact = 8;  // tokens below have a bucket each; buckets an octave above
constexpr int kFirstOctave = 3;

// What is believed before anything is seen, with the weight of two trajectories: half of those
// that reach x end before 2x + kScale. It is scale-free, so that the tail beyond the longest seen
// is taken to go on as long tails do, and not to end there.
constexpr double kPriorWeight = 2;
constexpr double kPriorScale = 512;

double prior_hazard(std::size_t bucket) {
  return 1 - (Survival::lower(bucket) + kPriorScale) / (Survival::lower(bucket + 1) + kPriorScale);
}

}  // namespace

std::size_t Survival::bucket(std::int64_t tokens) {
  const auto length = static_cast<std::uint64_t>(std::max<std::int64_t>(tokens, 0));
  if (length < kExact) return static_cast<std::size_t>(length);
  const int octave = static_cast<int>(std::bit_width(length)) - 1;
  const auto part = static_cast<std::size_t>(length >> (octave - kFirstOctave)) & (kExact - 1);
  return std::min(kExact * static_cast<std::size_t>(octave - kFirstOctave + 1) + part,
                  kBuckets - 1);
}

double Survival::lower(std::size_t bucket) {
  if (bucket < kExact) return static_cast<double>(bucket);
  const auto octave = static_cast<int>(bucket / kExact) - 1;
  return std::ldexp(static_cast<double>(kExact + bucket % kExact), octave);
}

Survival::Survival() { refresh(); }

void Survival::add(std::int64_t tokens, bool cut) {
  (cut ? cut_ : ended_)[bucket(tokens)] += 1;
  total_ += 1;
}

void Survival::clear_running() { running_.fill(0); }

void Survival::add_running(std::int64_t tokens) { running_[bucket(tokens)] += 1; }

void Survival::halve() {
  for (double& count : ended_) count /= 2;
  for (double& count : cut_) count /= 2;
  total_ /= 2;
}

void Survival::refresh() {
  std::array<double, kBuckets> hazard;
  double entered = 0;
  for (std::size_t b = kBuckets; b-- > 0;) {
    const double censored = cut_[b] + running_[b];
    entered += ended_[b] + censored;
    // Those censored in a bucket were at risk in half of it.
    const double risked = entered - censored / 2;
    hazard[b] = (ended_[b] + kPriorWeight * prior_hazard(b)) / (risked + kPriorWeight);
  }
  above_[0] = 1;
  for (std::size_t b = 0; b < kBuckets; ++b) above_[b + 1] = above_[b] * (1 - hazard[b]);
  integral_[kBuckets] = 0;
  double mass = 0, sum = 0, squares = 0;
  for (std::size_t b = kBuckets; b-- > 0;) {
    integral_[b] = integral_[b + 1] + (lower(b + 1) - lower(b)) * (above_[b] + above_[b + 1]) / 2;
    // The moments are of what was seen: the tail that was only believed in would swamp them.
    const double seen = ended_[b] + cut_[b] + running_[b];
    if (seen == 0 && mass == 0) continue;
    const double share = mass == 0 ? above_[b] : above_[b] - above_[b + 1];
    const double logarithm = std::log(std::max(1.0, (lower(b) + lower(b + 1)) / 2));
    mass += share;
    sum += share * logarithm;
    squares += share * logarithm * logarithm;
  }
  log_mean_ = mass > 0 ? sum / mass : std::log(kPriorScale);
  log_variance_ = mass > 0 ? std::max(0.0, squares / mass - log_mean_ * log_mean_) : 1;
}

double Survival::above(double tokens) const {
  if (tokens <= 0) return 1;
  const std::size_t b = bucket(static_cast<std::int64_t>(std::min(tokens, 0x1p38)));
  const double part = (tokens - lower(b)) / (lower(b + 1) - lower(b));
  return above_[b] + (above_[b + 1] - above_[b]) * std::min(part, 1.0);
}

double Survival::integral(double tokens) const {
  const std::size_t b = bucket(static_cast<std::int64_t>(std::min(tokens, 0x1p38)));
  const double left = std::max(0.0, lower(b + 1) - tokens);
  return integral_[b + 1] + left * (above(tokens) + above_[b + 1]) / 2;
}

double Survival::rest(double tokens, double limit) const {
  if (tokens >= limit) return 0;
  return std::clamp((integral(tokens) - integral(limit)) / above(tokens), 0.0, limit - tokens);
}

}  // namespace kimisys::rollout
