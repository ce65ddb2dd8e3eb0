// The time of one engine's list.
#include <algorithm>
#include <vector>

#include "rollout/offline.h"

namespace kimisys::rollout {

namespace {

struct Run {
  std::int64_t end = 0;   // the step after which it is gone
  std::int64_t base = 0;  // it holds base + s tokens before step s
};

// How many steps one more must wait, at least, before it and all that run fit until their ends; 0:
// they fit now. `runs` by falling end. Just before its end a sequence is at its largest together
// with all that outlive it: these moments suffice. One that fails while the new one runs needs it
// to come later by as much as is too much. Its own fails until it ends with the next that outlives
// it, as those grow too.
std::int64_t wait(const std::vector<Run>& runs, const Run& more, std::int64_t capacity) {
  std::int64_t base = 0;
  std::int64_t count = 0;
  const auto excess = [&](const Run& run) {
    base += run.base;
    ++count;
    return base + count * (run.end - 1) - capacity;
  };
  std::size_t i = 0;
  while (i < runs.size() && runs[i].end > more.end) excess(runs[i++]);
  std::int64_t steps = excess(more) > 0 ? runs[i - 1].end - more.end : 0;
  for (; i < runs.size(); ++i) steps = std::max(steps, excess(runs[i]));
  return steps;
}

std::int64_t held_steps(const EngineModel& model, std::span<const Output> outputs,
                        std::span<const std::uint32_t> list) {
  std::vector<Run> runs;
  runs.reserve(list.size());
  const auto most = static_cast<std::size_t>(model.max_sequences);
  std::int64_t step = 0;
  std::size_t next = 0;
  while (next < list.size() || !runs.empty()) {
    std::int64_t waits = 0;
    for (; next < list.size() && runs.size() < most; ++next) {
      const Output& output = outputs[list[next]];
      const Run run{step + output.length, output.prompt - step};
      waits = wait(runs, run, model.kv_capacity);
      if (waits > 0) break;
      const auto later = [](const Run& a, const Run& b) { return a.end > b.end; };
      runs.insert(std::upper_bound(runs.begin(), runs.end(), run, later), run);
    }
    step = waits > 0 ? std::min(step + waits, runs.back().end) : runs.back().end;
    while (!runs.empty() && runs.back().end == step) runs.pop_back();
  }
  return step;
}

// Nothing is computed twice and no step is empty: the time is the sum of what each token costs. At
// most kMaxTicks.
Ticks unbroken_time(const EngineModel& model, std::span<const Output> outputs,
                    std::span<const std::uint32_t> list, std::int64_t steps) {
  const StepCosts costs(model);
  Wide time = Wide{costs.step} * steps;
  for (const std::uint32_t i : list) {
    const Ticks alone = costs.decode(outputs[i].length, 1, outputs[i].prompt);
    if (alone == kMaxTicks) return kMaxTicks;
    time += Wide{alone} - Wide{costs.step} * outputs[i].length +
            Wide{costs.prefill_token} * outputs[i].prompt;
  }
  return static_cast<Ticks>(std::min(time, Wide{kMaxTicks}));
}

Ticks at_once_time(const EngineModel& model, std::span<const Output> outputs,
                   std::span<const std::uint32_t> list) {
  SimulatedEngine engine(model, 0);
  for (const std::uint32_t i : list) {
    Sequence sequence;
    sequence.context = outputs[i].prompt;
    sequence.goal = outputs[i].length;
    sequence.ends = EndReason::kStop;
    engine.start(sequence, 0);
  }
  std::vector<Word> words;
  Ticks now = 0;
  for (engine.begin(0); engine.boundary() != kNoTicks; engine.begin(now)) {
    now = engine.boundary();
    engine.settle();
    if (engine.has_news()) engine.say(words);
    words.clear();
  }
  return now;
}

}  // namespace

Ticks list_time(const EngineModel& model, std::span<const Output> outputs,
                std::span<const std::uint32_t> list, Admit admit) {
  if (list.empty()) return 0;
  std::int64_t peak = 0;
  std::int64_t longest = 0;
  for (const std::uint32_t i : list) {
    peak += outputs[i].prompt + outputs[i].length - 1;
    longest = std::max(longest, outputs[i].length);
  }
  const bool all_fit =
      peak <= model.kv_capacity && list.size() <= static_cast<std::size_t>(model.max_sequences);
  if (all_fit) return unbroken_time(model, outputs, list, longest);
  if (admit == Admit::kAtOnce) return at_once_time(model, outputs, list);
  return unbroken_time(model, outputs, list, held_steps(model, outputs, list));
}

}  // namespace kimisys::rollout
