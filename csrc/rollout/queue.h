// The waiting trajectories, in the order of the policy. What has begun goes before what has not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "rollout/predict.h"
#include "rollout/state.h"

namespace kimisys::rollout {

class Queue {
 public:
  // O(log n). A trajectory is in at most once.
  void push(const State& state, const Predictor& predictor, Slot trajectory);
  // What a sibling's end says of the others of a group: their places change.
  void reorder(const State& state, const Predictor& predictor, Slot group);
  void erase(Slot trajectory);

  // The next that `may` accepts, without taking it out; kNoSlot: none. Looks at few: where the
  // first ones are refused because no engine has room, the rest would be too.
  Slot front(const State& state) const;

  std::size_t size() const;
  std::size_t begun() const;  // of those, how many have tokens

 private:
  using Key = std::tuple<bool, std::uint64_t, std::uint32_t, Slot>;
  std::set<Key> order_;
  std::vector<Key> keys_;
  std::size_t begun_ = 0;
};

}  // namespace kimisys::rollout
