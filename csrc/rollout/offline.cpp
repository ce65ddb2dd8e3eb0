#include "rollout/offline.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"

namespace kimisys::rollout {

namespace {

using List = std::vector<std::uint32_t>;

// splitmix64 (Steele, Lea, Flood 2014): the same numbers everywhere, unlike the standard library's
// distributions.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : state_(seed) {}
  // Evenly from [0, sides), but for 2^-32 of bias. sides < 2^32.
  std::size_t roll(std::size_t sides) { return ((next() >> 32) * sides) >> 32; }

 private:
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};

struct Timed {  // an engine's list
  List list;
  Admit admit = Admit::kHeld;
  Ticks time = 0;
};

class Search {
 public:
  Search(const std::vector<EngineModel>& engines, const std::vector<Output>& outputs,
         std::int64_t budget, std::uint64_t seed)
      : engines_(engines), outputs_(outputs), budget_(budget), dice_(seed) {}

  OfflineSchedule run();
  std::int64_t evaluations() const { return evaluations_; }

 private:
  using Lists = std::vector<Timed>;
  Lists spread() const;
  Lists together() const;
  bool fill(Lists& lists, double most) const;
  void time(Lists& lists);
  Ticks time(Timed& timed, std::size_t engine);
  std::size_t last_engine() const;
  bool hopeless(const Timed& timed, std::size_t engine, Ticks most) const;
  bool improve();
  bool improve_alone(std::size_t engine);
  void shake();
  void insert(List& list, std::uint32_t trajectory);
  List longest_first() const;

  const std::vector<EngineModel>& engines_;
  const std::vector<Output>& outputs_;
  const std::int64_t budget_;
  Dice dice_;
  Lists lists_;
  std::int64_t evaluations_ = 0;
};

List Search::longest_first() const {
  List order(outputs_.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return outputs_[a].length > outputs_[b].length;
  });
  return order;
}

// Each, longest first, to the engine that would be done with it the soonest.
Search::Lists Search::spread() const {
  Lists lists(engines_.size());
  std::vector<Work> works(engines_.size());
  for (const std::uint32_t i : longest_first()) {
    std::size_t best = 0;
    double soonest = 0;
    for (std::size_t e = 0; e < engines_.size(); ++e) {
      Work work = works[e];
      work.add(outputs_[i]);
      const double seconds = least_seconds(work, engines_[e]);
      if (e == 0 || seconds < soonest) {
        best = e;
        soonest = seconds;
      }
    }
    works[best].add(outputs_[i]);
    lists[best].list.push_back(i);
  }
  return lists;
}

// The longest together, so that few engines pay for their many steps: each engine is filled in
// turn until `most` seconds. Whether all fit.
bool Search::fill(Lists& lists, double most) const {
  for (Timed& timed : lists) timed.list.clear();
  std::size_t e = 0;
  Work work;
  for (const std::uint32_t i : longest_first()) {
    Work more = work;
    more.add(outputs_[i]);
    while (least_seconds(more, engines_[e]) > most) {
      if (++e == engines_.size()) return false;
      more = {};
      more.add(outputs_[i]);
    }
    work = more;
    lists[e].list.push_back(i);
  }
  return true;
}

Search::Lists Search::together() const {
  Lists lists(engines_.size());
  double low = 0;
  double high = 1;
  while (!fill(lists, high)) high *= 2;
  for (int halvings = 0; halvings < 40; ++halvings) {
    const double middle = (low + high) / 2;
    (fill(lists, middle) ? high : low) = middle;
  }
  fill(lists, high);
  return lists;
}

Ticks Search::time(Timed& timed, std::size_t engine) {
  ++evaluations_;
  return timed.time = list_time(engines_[engine], outputs_, timed.list, timed.admit);
}

// Of a start: each engine admits in the way that suits it better.
void Search::time(Lists& lists) {
  for (std::size_t e = 0; e < lists.size(); ++e) {
    Timed& timed = lists[e];
    timed.time = list_time(engines_[e], outputs_, timed.list, Admit::kHeld);
    const Ticks at_once = list_time(engines_[e], outputs_, timed.list, Admit::kAtOnce);
    if (at_once < timed.time) {
      timed.admit = Admit::kAtOnce;
      timed.time = at_once;
    }
  }
}

Ticks makespan(const std::vector<Timed>& lists) {
  Ticks last = 0;
  for (const Timed& timed : lists) last = std::max(last, timed.time);
  return last;
}

std::size_t Search::last_engine() const {
  std::size_t last = 0;
  for (std::size_t e = 1; e < lists_.size(); ++e) {
    if (lists_[e].time > lists_[last].time) last = e;
  }
  return last;
}

// A bound says that this list cannot be done before `most`; it need not be timed.
bool Search::hopeless(const Timed& timed, std::size_t engine, Ticks most) const {
  Work work;
  for (const std::uint32_t i : timed.list) work.add(outputs_[i]);
  // The bound is computed in floating point: it must be clearly beaten.
  return least_seconds(work, engines_[engine]) * (1 - 1e-9) > seconds_of(most);
}

void Search::insert(List& list, std::uint32_t trajectory) {
  const auto longer = [&](std::uint32_t a, std::uint32_t b) {
    return outputs_[a].length > outputs_[b].length;
  };
  // Longest first is a good order, though not always the best.
  const bool anywhere = dice_.roll(4) == 0;
  const auto at = anywhere ? list.begin() + static_cast<std::ptrdiff_t>(dice_.roll(list.size() + 1))
                           : std::upper_bound(list.begin(), list.end(), trajectory, longer);
  list.insert(at, trajectory);
}

// Another order, or another way to admit, on one engine.
bool Search::improve_alone(std::size_t engine) {
  Timed changed = lists_[engine];
  if (dice_.roll(8) == 0) {
    changed.admit = changed.admit == Admit::kHeld ? Admit::kAtOnce : Admit::kHeld;
  } else {
    const std::size_t from = dice_.roll(changed.list.size());
    const std::uint32_t moved = changed.list[from];
    changed.list.erase(changed.list.begin() + static_cast<std::ptrdiff_t>(from));
    const std::size_t to = dice_.roll(changed.list.size() + 1);
    changed.list.insert(changed.list.begin() + static_cast<std::ptrdiff_t>(to), moved);
  }
  if (time(changed, engine) >= lists_[engine].time) return false;
  lists_[engine] = std::move(changed);
  return true;
}

// One random change to what the last engine has; kept if it lowers the time of those it touches.
bool Search::improve() {
  const std::size_t last = last_engine();
  const bool alone = lists_.size() == 1 || dice_.roll(4) == 0;
  if (alone) return improve_alone(last);
  std::size_t other = dice_.roll(lists_.size() - 1);
  other += other >= last ? 1 : 0;
  Timed from = lists_[last];
  Timed to = lists_[other];
  const std::size_t taken = dice_.roll(from.list.size());
  const std::uint32_t gone = from.list[taken];
  from.list.erase(from.list.begin() + static_cast<std::ptrdiff_t>(taken));
  if (!to.list.empty() && dice_.roll(2) == 0) {
    const std::size_t back = dice_.roll(to.list.size());
    const std::uint32_t come = to.list[back];
    to.list.erase(to.list.begin() + static_cast<std::ptrdiff_t>(back));
    insert(from.list, come);
  }
  insert(to.list, gone);
  const Ticks most = lists_[last].time;
  if (hopeless(to, other, most) || hopeless(from, last, most)) return false;
  if (time(to, other) >= most || time(from, last) >= most) return false;
  lists_[last] = std::move(from);
  lists_[other] = std::move(to);
  return true;
}

// Random moves, to leave a schedule that no single change improves.
void Search::shake() {
  for (std::size_t moves = 1 + dice_.roll(4); moves > 0; --moves) {
    const std::size_t from = moves == 1 ? last_engine() : dice_.roll(lists_.size());
    const std::size_t to = dice_.roll(lists_.size());
    if (lists_[from].list.empty()) continue;
    const std::size_t taken = dice_.roll(lists_[from].list.size());
    const std::uint32_t gone = lists_[from].list[taken];
    lists_[from].list.erase(lists_[from].list.begin() + static_cast<std::ptrdiff_t>(taken));
    insert(lists_[to].list, gone);
    time(lists_[from], from);
    if (to != from) time(lists_[to], to);
  }
}

OfflineSchedule Search::run() {
  lists_ = spread();
  time(lists_);
  Lists other = together();
  time(other);
  if (makespan(other) < makespan(lists_)) lists_ = other;
  Lists best = lists_;
  // Long enough that each pair of trajectories of two engines has had its chance in small cases,
  // and that a large one is not shaken before the easy gains are made.
  const auto patience = static_cast<std::int64_t>(50 + 4 * outputs_.size());
  std::int64_t tries = 0;  // those that a bound refuses cost time too, but no evaluation
  for (std::int64_t idle = 0; evaluations_ < budget_ && tries < 10 * budget_; ++tries) {
    idle = improve() ? 0 : idle + 1;
    if (makespan(lists_) < makespan(best)) best = lists_;
    if (idle >= patience) {
      lists_ = best;
      shake();
      idle = 0;
    }
  }
  OfflineSchedule schedule;
  schedule.seconds = seconds_of(makespan(best));
  for (Timed& timed : best) {
    schedule.lists.push_back(std::move(timed.list));
    schedule.admit.push_back(timed.admit);
  }
  return schedule;
}

}  // namespace

Offline offline(const Simulation& simulation, const Lots& lots, std::int64_t evaluations,
                std::uint64_t seed) {
  KIMISYS_CHECK(evaluations >= 0, ErrorCode::kScheduler, "offline: evaluations is ", evaluations,
                "; give how many engine lists may be timed in each iteration, 0 or more");
  const std::vector<std::vector<Output>> iterations = whole_iterations(simulation, lots);
  Offline found;
  found.seconds = seconds_between(simulation, iterations);
  for (const std::vector<Output>& outputs : iterations) {
    Search search(simulation.engines, outputs, evaluations, seed++);
    found.iterations.push_back(search.run());
    KIMISYS_CHECK(found.iterations.back().seconds < seconds_of(kMaxTicks), ErrorCode::kScheduler,
                  "offline: iteration ", found.iterations.size(), " of ", iterations.size(),
                  " takes more than ten days; are the costs of the engines in seconds?");
    found.seconds += found.iterations.back().seconds;
    found.evaluations += search.evaluations();
  }
  return found;
}

}  // namespace kimisys::rollout
