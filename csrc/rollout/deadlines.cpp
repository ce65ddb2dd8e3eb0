#include "rollout/deadlines.h"

#include <algorithm>

namespace kimisys::rollout {

// Ties go by slot, so that leases expire in an order that the events alone decide.
bool Deadlines::later(const Entry& left, const Entry& right) {
  if (left.deadline != right.deadline) return left.deadline > right.deadline;
  return left.slot > right.slot;
}

bool Deadlines::live(const State& state, const Entry& entry) {
  const Trajectory& trajectory = state.trajectories[entry.slot];
  return leased(trajectory) && trajectory.epoch == entry.epoch;
}

std::int64_t Deadlines::of(const State& state, const Trajectory& trajectory) {
  const std::int64_t from =
      trajectory.phase == Phase::kPausing ? trajectory.since : trajectory.heard;
  return from + state.config.lease_timeout;
}

void Deadlines::add(const State& state, Slot slot) {
  const Trajectory& trajectory = state.trajectories[slot];
  if (heap_.size() >= full_) {
    // Dead leases would stay for as long as a lease may be silent.
    std::erase_if(heap_, [&](const Entry& entry) { return !live(state, entry); });
    std::make_heap(heap_.begin(), heap_.end(), later);
    full_ = 2 * heap_.size() + 64;
  }
  heap_.push_back({of(state, trajectory), slot, trajectory.epoch});
  std::push_heap(heap_.begin(), heap_.end(), later);
}

std::int64_t Deadlines::next(const State& state) {
  while (!heap_.empty()) {
    const Entry& first = heap_.front();
    const Trajectory& trajectory = state.trajectories[first.slot];
    const bool lives = live(state, first);
    if (lives && first.deadline == of(state, trajectory)) return first.deadline;
    std::pop_heap(heap_.begin(), heap_.end(), later);
    if (!lives) {
      heap_.pop_back();
      continue;
    }
    heap_.back().deadline = of(state, trajectory);
    std::push_heap(heap_.begin(), heap_.end(), later);
  }
  return kNever;
}

Slot Deadlines::expired(const State& state) {
  if (next(state) > state.now) return kNoSlot;
  const Slot slot = heap_.front().slot;
  std::pop_heap(heap_.begin(), heap_.end(), later);
  heap_.pop_back();
  return slot;
}

}  // namespace kimisys::rollout
