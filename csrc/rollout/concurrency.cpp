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
// Moments at which the growth is looked at, in units of the mean rest.
constexpr std::array<double, 5> kMoments = {0.125, 0.25, 0.5, 1, 2};

// The share of sequences with such a mean rest that still run after `time`, both in tokens: 1 over
// the first terms of exp(time / rest), within 0.06 of its inverse.
double alive(double time, double rest) {
  const double x = time / rest;
  return 1 / (1 + x + x * x / 2);
}

// What may be held before the cache is in danger.
double safe(const Engine& engine, double sequences) {
  const auto capacity = static_cast<double>(engine.kv_capacity);
  return capacity - std::min(kUnheard * sequences, kMostUnheard * capacity);
}

}  // namespace

double peak(const State& state, const Predictor& predictor, const Engine& engine, Slot one_more) {
  struct Sequence {
    double context, rest;
  };
  std::vector<Sequence> sequences;
  sequences.reserve(engine.leases.size() + 1);
  const double horizon = predictor.typical();
  double now = 0, mean = 0;
  const auto add = [&](Slot slot) {
    // Beyond a typical length the future is left to the future: what grows longer than that is
    // rare, and then paused.
    const double rest = std::min(predictor.rest(state, slot), horizon);
    sequences.push_back({static_cast<double>(state.context(slot)), rest});
    now += sequences.back().context;
    mean += sequences.back().rest;
  };
  for (const Slot slot : engine.leases) {
    if (state.trajectories[slot].phase == Phase::kRunning) add(slot);
  }
  if (one_more != kNoSlot) add(one_more);
  if (sequences.empty()) return 0;
  mean /= static_cast<double>(sequences.size());
  double highest = now;
  for (const double moment : kMoments) {
    const double time = moment * mean;
    double tokens = 0;
    for (const Sequence& sequence : sequences) {
      tokens += alive(time, sequence.rest) * (sequence.context + time);
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
  if (static_cast<double>(engine.kv_tokens) + context > planned) return false;
  return peak(state, predictor, engine, trajectory) <= planned;
}

std::vector<Slot> overflow(const State& state, const Predictor& predictor, const Engine& engine) {
  std::vector<Slot> paused;
  if (state.config.concurrency == Concurrency::kFixed) return paused;
  if (static_cast<double>(engine.kv_tokens) <=
      safe(engine, static_cast<double>(engine.sequences))) {
    return paused;
  }
  // The shortest are the cheapest to compute again, those that may end soonest can wait longest.
  // The last one stays: elsewhere it would not fit better.
  std::vector<std::pair<double, Slot>> running;
  double tokens = 0;
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
