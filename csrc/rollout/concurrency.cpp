#include "rollout/concurrency.h"

#include <algorithm>
#include <array>
#include <utility>

#include "rollout/queue.h"

namespace kimisys::rollout {
namespace {

// Tokens of each sequence that an engine may make before the scheduler hears of them, and the most
// of its cache that is kept for them.
constexpr double kUnheard = 64;
constexpr double kMostUnheard = 0.02;
// Sequences of an engine that are looked at to see all.
constexpr std::size_t kLooked = 128;
// Moments at which the growth is looked at, in units of the mean rest.
constexpr std::array<double, 5> kMoments = {0.125, 0.25, 0.5, 1, 2};

// The share of sequences with such a mean rest that still run after `time`, both in tokens: 1 over
// the first terms of exp(time / rest), within 0.06 of its inverse.
double alive(double time, double rest) {
  const double x = time / rest;
  return 1 / (1 + x + x * x / 2);
}

// What the engine holds, as far as it is known.
double held(const Engine& engine) {
  return static_cast<double>(engine.kv_tokens + engine.kv_unheard);
}

// What may be held before the cache is in danger.
double safe(const Engine& engine, double sequences) {
  const auto capacity = static_cast<double>(engine.kv_capacity);
  return capacity - std::min(kUnheard * sequences, kMostUnheard * capacity);
}

}  // namespace

double peak(const State& state, const Predictor& predictor, const Engine& engine, Slot one_more) {
  struct Sequence {
    double context, rest, weight;
  };
  std::array<Sequence, kLooked + 2> sequences;
  std::size_t count = 0;
  // Beyond a typical length the future is left to the future: what grows longer than that is rare,
  // and then paused.
  const double horizon = predictor.typical();
  double now = 0, mean = 0, weights = 0;
  const auto add = [&](Slot slot, double weight) {
    const auto context = static_cast<double>(state.context(slot));
    const double rest = std::clamp(predictor.rest_alone(state.trajectories[slot]), 1.0, horizon);
    sequences[count++] = {context, rest, weight};
    now += weight * context;
    mean += weight * rest;
    weights += weight;
  };
  // Of very many sequences, evenly many stand for all.
  const std::size_t running = engine.leases.size();
  const std::size_t step = running / kLooked + 1;
  const auto looked = static_cast<double>((running + step - 1) / step);
  for (std::size_t i = 0; i < running; i += step) {
    if (state.trajectories[engine.leases[i]].phase != Phase::kRunning) continue;
    add(engine.leases[i], static_cast<double>(running) / looked);
  }
  if (one_more != kNoSlot) add(one_more, 1);
  if (count == 0) return 0;
  double highest = now;
  for (const double moment : kMoments) {
    const double time = moment * mean / weights;
    double tokens = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const Sequence& one = sequences[i];
      tokens += one.weight * alive(time, one.rest) * (one.context + time);
    }
    highest = std::max(highest, tokens);
  }
  return highest;
}

bool has_room(const State& state, const Predictor& predictor, const Engine& engine,
              Slot trajectory) {
  if (engine.sequences >= engine.max_sequences) return false;
  if (state.config.concurrency == Concurrency::kFixed || engine.sequences == 0) return true;
  const double planned = state.config.kv_headroom * static_cast<double>(engine.kv_capacity);
  const auto context = static_cast<double>(state.context(trajectory));
  if (held(engine) + context > planned) return false;
  // No sequence with a mean rest of r is expected to hold more than 0.415 r above what it has now.
  const double growth = 0.415 * predictor.typical() * static_cast<double>(engine.sequences + 1);
  if (held(engine) + context + growth <= planned) return true;
  const auto unheard = static_cast<double>(engine.kv_unheard);
  return peak(state, predictor, engine, trajectory) + unheard <= planned;
}

std::vector<Slot> overflow(const State& state, const Predictor& predictor, const Engine& engine) {
  std::vector<Slot> paused;
  if (state.config.concurrency == Concurrency::kFixed) return paused;
  if (held(engine) <= safe(engine, static_cast<double>(engine.sequences))) return paused;
  // The shortest are the cheapest to compute again, those that may end soonest can wait longest.
  // The last one stays: elsewhere it would not fit better.
  std::vector<std::pair<double, Slot>> running;
  auto tokens = static_cast<double>(engine.kv_unheard);
  for (const Slot slot : engine.leases) {
    if (state.trajectories[slot].phase != Phase::kRunning) continue;
    const auto context = static_cast<double>(state.context(slot));
    running.emplace_back(by_potential(state.config) ? predictor.potential(state, slot) : context,
                         slot);
    tokens += context;
  }
  std::sort(running.begin(), running.end());
  auto left = static_cast<double>(running.size());
  for (const auto& [order, slot] : running) {
    if (left <= 1 || tokens <= safe(engine, left)) break;
    paused.push_back(slot);
    tokens -= static_cast<double>(state.context(slot));
    left -= 1;
  }
  return paused;
}

}  // namespace kimisys::rollout
