#include "rollout/predict.h"

#include <algorithm>
#include <cmath>

namespace kimisys::rollout {
namespace {

// Correlations below tell less than their own error.
constexpr double kLeastCorrelation = 0.1;
// Groups that the belief in uncorrelated siblings weighs as much as.
constexpr double kPriorGroups = 8;
// A prediction from siblings that the trajectory itself has outgrown this far says nothing more.
constexpr double kLeastProbability = 0.02;
// Standard deviations to where no length of a batch lies. Of n normal ones the farthest lies at
// sqrt(2 ln n), 4.3 for 10,000; the deviation is itself an estimate.
constexpr double kFar = 5;
// A change of the logarithm's mean, of its variance or of the correlation that counts.
constexpr double kChange = 0.05;
// Beyond this many lengths, and this many times those alive, old ones fade.
constexpr double kMemory = 4096;
constexpr double kMemoryOfLive = 4;

double logarithm(std::int64_t tokens) {
  return std::log(static_cast<double>(std::max<std::int64_t>(tokens, 1)));
}

double normal(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }

// E[min(L, limit) - tokens | L > tokens] where ln L is normal; negative: L > tokens is unlikely.
double lognormal_rest(double mean, double deviation, double tokens, double limit) {
  const double from = (std::log(std::max(tokens, 1.0)) - mean) / deviation;
  const double to = (std::log(limit) - mean) / deviation;
  const double above = normal(-from);
  if (above < kLeastProbability) return -1;
  const double between = std::exp(mean + deviation * deviation / 2) *
                         (normal(to - deviation) - normal(from - deviation));
  return (between + limit * normal(-to)) / above - tokens;
}

}  // namespace

void Predictor::finished(const State& state, Slot trajectory) {
  const Trajectory& ended = state.trajectories[trajectory];
  lengths_.add(ended.tokens, ended.ended == EndReason::kLength);
  const double length = logarithm(ended.tokens);
  int siblings = 0;
  for (const Slot slot : state.group_of(trajectory).trajectories) {
    const Trajectory& sibling = state.trajectories[slot];
    if (slot == trajectory || sibling.phase != Phase::kFinished) continue;
    const double other = logarithm(sibling.tokens);
    ++siblings;
    pairs_.count += 1;
    pairs_.sum += length + other;
    pairs_.squares += length * length + other * other;
    pairs_.products += length * other;
  }
  if (siblings == 1) pairs_.groups += 1;
  // Often at first, then in proportion: amortised, a length costs a constant.
  const auto alive = static_cast<std::int64_t>(state.trajectories.size());
  if (++unrefreshed_ >= 4 + alive / 64) refresh(state);
}

void Predictor::refresh(const State& state) {
  unrefreshed_ = 0;
  const auto alive = static_cast<double>(state.trajectories.size());
  if (lengths_.ended() > std::max(kMemory, kMemoryOfLive * alive)) {
    lengths_.halve();
    for (double* sum :
         {&pairs_.count, &pairs_.sum, &pairs_.squares, &pairs_.products, &pairs_.groups}) {
      *sum /= 2;
    }
  }
  lengths_.clear_running();
  for (const Trajectory& trajectory : state.trajectories) {
    const bool runs = trajectory.phase == Phase::kRunning || trajectory.phase == Phase::kPausing ||
                      trajectory.phase == Phase::kWaiting;
    if (runs && trajectory.tokens > 0) lengths_.add_running(trajectory.tokens);
  }
  lengths_.refresh();
  correlate();
  const std::array<double, 3> known = {lengths_.log_mean(), lengths_.log_variance(), correlation_};
  for (std::size_t i = 0; i < known.size(); ++i) {
    if (std::abs(known[i] - known_[i]) < kChange) continue;
    known_ = known;
    ++generation_;
    break;
  }
}

void Predictor::correlate() {
  // Fisher's intraclass correlation over pairs, drawn towards none while few groups were seen.
  correlation_ = 0;
  if (pairs_.count == 0) return;
  const double mean = pairs_.sum / (2 * pairs_.count);
  const double variance = pairs_.squares / (2 * pairs_.count) - mean * mean;
  const double covariance = pairs_.products / pairs_.count - mean * mean;
  if (variance < 1e-9) return;
  correlation_ =
      std::clamp(covariance / variance, 0.0, 1.0) * pairs_.groups / (pairs_.groups + kPriorGroups);
}

Predictor::Outlook Predictor::outlook(const State& state, Slot trajectory) const {
  const double mean = lengths_.log_mean();
  const double variance = lengths_.log_variance();
  Outlook outlook{mean, std::sqrt(variance), false};
  if (correlation_ < kLeastCorrelation || variance < 1e-9) return outlook;
  double count = 0, sum = 0;
  const auto tell = [&](double length) {
    count += 1;
    sum += length;
    const double weight = count * correlation_ / (1 + (count - 1) * correlation_);
    outlook.mean = mean + weight * (sum / count - mean);
    outlook.deviation = std::sqrt(variance * std::max(0.02, 1 - correlation_ * weight));
    outlook.told = true;
  };
  const Group& group = state.group_of(trajectory);
  for (const Slot slot : group.trajectories) {
    const Trajectory& sibling = state.trajectories[slot];
    if (sibling.phase == Phase::kFinished) tell(logarithm(sibling.tokens));
  }
  // One that runs tells only when it has become longer than its siblings made believe.
  const double believed = outlook.mean;
  for (const Slot slot : group.trajectories) {
    const Trajectory& sibling = state.trajectories[slot];
    if (slot == trajectory || sibling.phase == Phase::kFinished) continue;
    const double length = logarithm(sibling.tokens);
    if (length > believed) tell(length);
  }
  return outlook;
}

double Predictor::potential(const State& state, Slot trajectory) const {
  if (truth_) return rest(state, trajectory);
  const Trajectory& predicted = state.trajectories[trajectory];
  const auto tokens = static_cast<double>(predicted.tokens);
  const auto limit = static_cast<double>(predicted.limit);
  const Outlook told = outlook(state, trajectory);
  // What has come near to the most it might become was underrated: it may double.
  const double most = std::max(std::exp(told.mean + kFar * told.deviation), 2 * tokens);
  return std::max(1.0, std::min(most, limit) - tokens);
}

double Predictor::rest(const State& state, Slot trajectory) const {
  const Trajectory& predicted = state.trajectories[trajectory];
  const auto tokens = static_cast<double>(predicted.tokens);
  const auto limit = static_cast<double>(predicted.limit);
  if (truth_) {
    const auto length = truth_(state.group_of(trajectory).id, predicted.sample);
    return std::max(1.0, std::min(static_cast<double>(length), limit) - tokens);
  }
  const Outlook told = outlook(state, trajectory);
  double rest = -1;
  if (told.told) rest = lognormal_rest(told.mean, told.deviation, tokens, limit);
  if (rest < 0) rest = lengths_.rest(tokens, limit);
  return std::max(1.0, std::min(rest, limit - tokens));
}

}  // namespace kimisys::rollout
