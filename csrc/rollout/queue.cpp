#include "rollout/queue.h"

#include <algorithm>

namespace kimisys::rollout {

Queue::Key Queue::key(const State& state, const Predictor& predictor, Slot trajectory) {
  const Trajectory& waiting = state.trajectories[trajectory];
  const Order order = state.config.order;
  Key key;
  key.round = state.group_of(trajectory).round;
  key.number = state.group_of(trajectory).number;
  key.sample = waiting.sample;
  key.slot = trajectory;
  key.begun = waiting.tokens > 0;
  const bool potential = by_potential(state.config);
  if (key.begun && !potential) {
    key.rank = Rank::kBegun;
    key.round = -1;
  } else if (order == Order::kProbeFirst && !key.begun && waiting.sample == 0) {
    key.rank = Rank::kProbe;
  }
  // Of probes nothing is known that could order them.
  if (order != Order::kFifo && key.rank != Rank::kProbe) {
    key.rest =
        -(potential ? predictor.potential(state, trajectory) : predictor.rest(state, trajectory));
  }
  return key;
}

void Queue::push(const State& state, const Predictor& predictor, Slot trajectory) {
  if (trajectory >= keys_.size()) keys_.resize(std::max(state.trajectories.size(), keys_.size()));
  if (keys_[trajectory].slot != kNoSlot) return;
  keys_[trajectory] = key(state, predictor, trajectory);
  order_.insert(keys_[trajectory]);
  if (keys_[trajectory].begun) ++begun_;
}

void Queue::erase(Slot trajectory) {
  if (trajectory >= keys_.size() || keys_[trajectory].slot == kNoSlot) return;
  if (keys_[trajectory].begun) --begun_;
  order_.erase(keys_[trajectory]);
  keys_[trajectory].slot = kNoSlot;
}

void Queue::reorder(const State& state, const Predictor& predictor, Slot group) {
  if (state.config.order == Order::kFifo) return;
  refresh(state, predictor);
  for (const Slot slot : state.groups[group].trajectories) {
    if (slot >= keys_.size() || keys_[slot].slot == kNoSlot) continue;
    erase(slot);
    push(state, predictor, slot);
  }
}

void Queue::refresh(const State& state, const Predictor& predictor) {
  if (generation_ == predictor.generation()) return;
  generation_ = predictor.generation();
  std::vector<Slot> waiting;
  for (const Key& old : order_) waiting.push_back(old.slot);
  for (const Slot slot : waiting) {
    erase(slot);
    push(state, predictor, slot);
  }
}

Slot Queue::front() const { return order_.empty() ? kNoSlot : order_.begin()->slot; }

}  // namespace kimisys::rollout
