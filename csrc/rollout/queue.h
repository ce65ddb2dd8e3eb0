// The waiting trajectories, in the order of the policy. What has begun goes before what has not,
// except by kProbeFirst in iterations that end when everything has finished: there what may yet
// take longest goes first, or its end would be what all wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "rollout/predict.h"
#include "rollout/state.h"

namespace kimisys::rollout {

// Whether that exception holds.
inline bool by_potential(const Config& config) {
  return config.order == Order::kProbeFirst && config.token_budget == 0 && config.over_issue <= 1 &&
         config.live_limit == 0;
}

class Queue {
 public:
  // O(log n). A trajectory is in at most once.
  void push(const State& state, const Predictor& predictor, Slot trajectory);
  // What a sibling's end says of the others of a group: their places change. O(k log n), and
  // O(n log n) when the predictor has learned much.
  void reorder(const State& state, const Predictor& predictor, Slot group);
  // Nothing happens if it is not in. O(log n).
  void erase(Slot trajectory);

  // The next, without taking it out; kNoSlot: none. Where it is refused because no engine has
  // room, the others would be too. O(1).
  Slot front() const;

  std::size_t size() const { return order_.size(); }
  std::size_t begun() const { return begun_; }  // of those, how many have tokens

 private:
  enum class Rank : std::uint8_t { kBegun, kProbe, kOther };
  struct Key {
    Rank rank = Rank::kOther;
    std::int64_t round = 0;  // what an earlier iteration left goes first; what has begun: -1
    double rest = 0;         // predicted, negated: the longest first; 0 where it does not count
    bool begun = false;
    std::uint64_t number = 0;
    std::uint32_t sample = 0;
    Slot slot = kNoSlot;

    auto tied() const { return std::tie(round, rank, rest, number, sample, slot); }
    bool operator<(const Key& other) const { return tied() < other.tied(); }
  };
  static Key key(const State& state, const Predictor& predictor, Slot trajectory);

  void refresh(const State& state, const Predictor& predictor);

  std::int64_t generation_ = 0;
  std::set<Key> order_;
  std::vector<Key> keys_;  // by trajectory's slot; slot is kNoSlot where it is not in
  std::size_t begun_ = 0;
};

}  // namespace kimisys::rollout
