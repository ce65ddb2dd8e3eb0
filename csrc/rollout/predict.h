// Predicts lengths from what has been seen: the lengths of all that finished, how far they follow
// those of their siblings, and how long a trajectory and its siblings have become. Never from the
// future.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>

#include "rollout/state.h"
#include "rollout/survival.h"

namespace kimisys::rollout {

class Predictor {
 public:
  // A trajectory finished, `tokens` long. Called before its siblings' slots are freed. O(k), and
  // O(trajectories) once in a while, amortised to a constant.
  void finished(const State& state, Slot trajectory);

  // Output tokens still to come, in expectation: at least 1, at most what its limit leaves. O(k).
  double rest(const State& state, Slot trajectory) const;

  // As `rest`, without asking the siblings. O(1).
  double rest_alone(const Trajectory& trajectory) const {
    return lengths_.rest(static_cast<double>(trajectory.tokens),
                         static_cast<double>(trajectory.limit));
  }

  // Output tokens that may still come at the most, as far as anything in a batch goes; as `rest`
  // else. In an iteration that must finish everything this is what may make its end late. O(k).
  double potential(const State& state, Slot trajectory) const;

  // The median length, as a measure of what is long.
  double typical() const { return std::exp(lengths_.log_mean()); }

  // Counts how often predictions have changed so much that an order by old ones is out of date.
  std::int64_t generation() const { return generation_; }

  // For simulations alone: from now on `rest` is what the true length leaves, so that a policy can
  // be compared with itself knowing the future.
  using Truth = std::function<std::int64_t(GroupId group, std::uint32_t sample)>;
  void reveal(Truth truth) { truth_ = std::move(truth); }

  // How far siblings' lengths follow each other, 0 to 1 (intraclass correlation of the logarithms).
  double correlation() const { return correlation_; }

 private:
  // ln(length) of one more sample of a group, as its siblings tell.
  struct Outlook {
    double mean = 0;
    double deviation = 0;
    bool told = false;  // by a sibling
  };
  Outlook outlook(const State& state, Slot trajectory) const;
  void refresh(const State& state);
  void correlate();

  // Sums over pairs of finished siblings, of logarithms of lengths.
  struct Pairs {
    double count = 0;
    double sum = 0;       // of both
    double squares = 0;   // of both
    double products = 0;  // of one with the other
    double groups = 0;    // that gave a pair
  };

  Truth truth_;
  Survival lengths_;
  Pairs pairs_;
  double correlation_ = 0;
  std::int64_t unrefreshed_ = 0;
  std::int64_t generation_ = 0;
  std::array<double, 3> known_ = {};  // mean, variance and correlation at that generation
};

}  // namespace kimisys::rollout
