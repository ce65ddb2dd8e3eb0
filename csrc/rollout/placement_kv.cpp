// kKvAware and kSticky: by the time of the engines' steps, which their KV and sequences make.
#include <algorithm>

#include "rollout/concurrency.h"
#include "rollout/placement.h"

namespace kimisys::rollout {
namespace {

// A move must gain this many times what computing the KV again takes: the engine that computes it
// keeps all its other sequences waiting meanwhile, and predictions err. From 2 to 8 makespans are
// the same; 8 moves the least.
constexpr double kHysteresis = 8;

struct Load {
  const Engine* engine = nullptr;
  double step = 0;  // microseconds
};

bool lighter(const Load& left, const Load& right) { return left.step < right.step; }

struct Candidate {
  Slot slot = kNoSlot;
  double gain = 0;  // microseconds, less the cost
};

// Sequences of an engine among which the one to move is looked for.
constexpr std::size_t kLooked = 64;

// The sequence of `from` that gains most by running on `to`.
Candidate best_move(const State& state, const Predictor& predictor, const Load& from,
                    const Load& to) {
  const Config& config = state.config;
  const std::vector<Slot>& leases = from.engine->leases;
  Candidate best;
  for (std::size_t i = 0; i < leases.size(); i += leases.size() / kLooked + 1) {
    const Slot slot = leases[i];
    const Trajectory& trajectory = state.trajectories[slot];
    const auto context = static_cast<double>(state.context(slot));
    const double own = config.sequence_cost + config.kv_cost * context;
    const double gained = predictor.rest_alone(trajectory) * (from.step - to.step - own);
    const double gain = gained - kHysteresis * config.prefill_cost * context;
    if (gain > best.gain || (gain == best.gain && gain > 0 && slot < best.slot)) {
      best = {slot, gain};
    }
  }
  return best;
}

// A small cache is full while its steps are still short: what it has no room for goes to a larger
// one, the one with the shortest steps that has room.
EngineId larger(const State& state, const Predictor& predictor, std::int64_t capacity,
                Slot trajectory) {
  const Engine* best = nullptr;
  for (const Engine& engine : state.engines) {
    if (!serves(state, engine) || engine.kv_capacity <= capacity) continue;
    if (best != nullptr && step_time(state.config, engine) >= step_time(state.config, *best)) {
      continue;
    }
    if (has_room(state, predictor, engine, trajectory)) best = &engine;
  }
  return best == nullptr ? kNoEngine : best->id;
}

}  // namespace

EngineId place_kv(const State& state, const Predictor& predictor, Slot trajectory) {
  const EngineId last = state.trajectories[trajectory].engine;
  const bool begun = state.trajectories[trajectory].tokens > 0;
  const Engine* best = nullptr;
  double least = 0;
  for (const Engine& engine : state.engines) {
    if (!will_serve(state, engine)) continue;
    if (begun && serves(state, engine) && engine.id == last &&
        state.config.placement == Placement::kSticky &&
        has_room(state, predictor, engine, trajectory)) {
      return last;
    }
    if (engine.sequences >= engine.max_sequences) continue;
    const double step = step_time(state.config, engine);
    if (best == nullptr || step < least || (step == least && engine.id == last)) {
      best = &engine;
      least = step;
    }
  }
  if (best == nullptr || !serves(state, *best)) return kNoEngine;
  if (has_room(state, predictor, *best, trajectory)) return best->id;
  return larger(state, predictor, best->kv_capacity, trajectory);
}

std::vector<Slot> moves(const State& state, const Predictor& predictor) {
  std::vector<Slot> moved;
  if (state.config.placement != Placement::kKvAware) return moved;
  const double least_gain = 2 * state.config.sequence_cost;
  Load hot, cold;
  for (const Engine& engine : state.engines) {
    if (!serves(state, engine)) continue;
    const Load load{&engine, step_time(state.config, engine)};
    if (hot.engine == nullptr || lighter(hot, load)) hot = load;
    if (cold.engine == nullptr || lighter(load, cold)) cold = load;
  }
  // One after the other: until it has gone the engine seems as full as before.
  if (hot.engine == nullptr || hot.engine->pausing > 0) return moved;
  if (hot.step - cold.step < least_gain) return moved;
  const Candidate best = best_move(state, predictor, hot, cold);
  if (best.slot == kNoSlot || !has_room(state, predictor, *cold.engine, best.slot)) return moved;
  moved.push_back(best.slot);
  return moved;
}

}  // namespace kimisys::rollout
