// The simplest policies.
#include <algorithm>

#include "rollout/concurrency.h"
#include "rollout/placement.h"
#include "rollout/predict.h"
#include "rollout/queue.h"

namespace kimisys::rollout {

void Predictor::finished(const State&, Slot) {}
double Predictor::rest(const State& state, Slot s) const {
  return static_cast<double>(state.trajectories[s].limit - state.trajectories[s].tokens);
}
double Predictor::correlation() const { return 0; }

void Queue::push(const State& state, const Predictor&, Slot slot) {
  const Trajectory& t = state.trajectories[slot];
  const Key key{t.tokens == 0, state.group_of(slot).number, t.sample, slot};
  if (keys_.size() <= slot) keys_.resize(slot + 1);
  keys_[slot] = key;
  order_.insert(key);
  if (t.tokens > 0) ++begun_;
}
void Queue::reorder(const State&, const Predictor&, Slot) {}
void Queue::erase(Slot slot) {
  if (order_.erase(keys_[slot]) > 0 && !std::get<0>(keys_[slot])) --begun_;
}
Slot Queue::front(const State&) const {
  return order_.empty() ? kNoSlot : std::get<3>(*order_.begin());
}
std::size_t Queue::size() const { return order_.size(); }
std::size_t Queue::begun() const { return begun_; }

bool has_room(const State&, const Predictor&, const Engine& engine, Slot) {
  return engine.sequences < engine.max_sequences;
}
std::vector<Slot> overflow(const State&, const Predictor&, const Engine&) { return {}; }

EngineId place(const State& state, const Predictor& predictor, Slot slot) {
  const Engine* best = nullptr;
  for (const Engine& engine : state.engines) {
    if (engine.phase != EnginePhase::kServing || !has_room(state, predictor, engine, slot)) {
      continue;
    }
    if (best == nullptr || engine.sequences < best->sequences) best = &engine;
  }
  return best == nullptr ? kNoEngine : best->id;
}
std::vector<Slot> moves(const State&, const Predictor&) { return {}; }

}  // namespace kimisys::rollout
