// Predicts lengths from what has been seen: the lengths of all that finished, how far they follow
// those of their siblings, and how long a trajectory and its siblings have become. Never from the
// future.
#pragma once

#include <cstdint>
#include <vector>

#include "rollout/state.h"

namespace kimisys::rollout {

class Predictor {
 public:
  // A trajectory finished, `tokens` long. Called before its siblings' slots are freed. O(k).
  void finished(const State& state, Slot trajectory);

  // Output tokens still to come, in expectation: at least 1, at most what its limit leaves. O(k).
  double rest(const State& state, Slot trajectory) const;

  // How far siblings' lengths follow each other, 0 to 1 (intraclass correlation of the logarithms).
  double correlation() const;

 private:
  // Policy's own.
};

}  // namespace kimisys::rollout
