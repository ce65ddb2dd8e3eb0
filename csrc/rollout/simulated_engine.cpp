#include "rollout/simulated_engine.h"

#include <algorithm>
#include <cmath>

namespace kimisys::rollout {

Ticks ticks_of(double seconds) { return std::llround(seconds * kTicksPerSecond); }

StepCosts::StepCosts(const EngineModel& model)
    : step(ticks_of(model.step)),
      sequence(ticks_of(model.sequence)),
      kv_token(ticks_of(model.kv_token)),
      prefill_token(ticks_of(model.prefill_token)) {}

Ticks StepCosts::decode(std::int64_t steps, std::int64_t batch, std::int64_t kv) const {
  const Wide n = steps;
  const Wide held = n * kv + batch * (n * (n - 1) / 2);
  const Wide ticks = n * (step + Wide{sequence} * batch) + kv_token * held;
  return static_cast<Ticks>(std::min(ticks, Wide{kMaxTicks}));
}

SimulatedEngine::SimulatedEngine(const EngineModel& model, Ticks report_interval)
    : costs_(model),
      kv_capacity_(model.kv_capacity),
      max_sequences_(static_cast<std::size_t>(model.max_sequences)),
      report_interval_(report_interval) {}

Ticks SimulatedEngine::duration(std::int64_t steps) const {
  const auto batch = static_cast<std::int64_t>(running_.size());
  const Ticks prefill = prefill_ * costs_.prefill_token;
  return std::min(kMaxTicks - prefill, costs_.decode(steps, batch, kv_)) + prefill;
}

// The fewest steps that take at least `elapsed`; of those planned, whose time is known to suffice.
std::int64_t SimulatedEngine::steps_until(Ticks elapsed) const {
  std::int64_t low = 1;
  std::int64_t high = steps_;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (duration(middle) >= elapsed) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

void SimulatedEngine::truncate(Ticks now) {
  if (between_steps() || now >= boundary_) return;
  steps_ = steps_until(now - began_);
  boundary_ = began_ + duration(steps_);
}

Sequence* SimulatedEngine::find(Lease lease) {
  const auto same = [lease](const Sequence& sequence) { return sequence.lease == lease; };
  const auto running = std::find_if(running_.begin(), running_.end(), same);
  if (running != running_.end()) return &*running;
  const auto waiting = std::find_if(waiting_.begin(), waiting_.end(), same);
  return waiting != waiting_.end() ? &*waiting : nullptr;
}

void SimulatedEngine::start(const Sequence& sequence, Ticks now) {
  // Behind others that wait nothing changes: they wait for what the next boundary brings.
  if (waiting_.empty()) truncate(now);
  waiting_.push_back(sequence);
}

void SimulatedEngine::pause(Lease lease, Ticks now) {
  Sequence* sequence = find(lease);
  if (sequence == nullptr) return;
  truncate(now);
  sequence->pausing = true;
  news_ = true;
}

void SimulatedEngine::abort(Lease lease, Ticks now) {
  Sequence* sequence = find(lease);
  if (sequence == nullptr) return;
  truncate(now);
  sequence->aborted = true;
  news_ = true;
}

void SimulatedEngine::fail(Ticks now, std::vector<Sequence>& lost) {
  if (!between_steps()) {
    truncate(now);
    // Only whole steps have made tokens.
    if (boundary_ > now) --steps_;
    for (Sequence& sequence : running_) sequence.made += steps_;
    decoded_ += steps_ * static_cast<std::int64_t>(running_.size());
    busy_ += now - began_;
  }
  lost.insert(lost.end(), running_.begin(), running_.end());
  lost.insert(lost.end(), waiting_.begin(), waiting_.end());
  running_.clear();
  waiting_.clear();
  kv_ = 0;
  boundary_ = kNoTicks;
  report_ = news_ = false;
}

void SimulatedEngine::settle() {
  for (Sequence& sequence : running_) {
    sequence.made += steps_;
    news_ = news_ || sequence.made == sequence.goal;
  }
  const std::int64_t tokens = steps_ * static_cast<std::int64_t>(running_.size());
  kv_ += tokens;
  decoded_ += tokens;
  busy_ += boundary_ - began_;
  if (report_interval_ > 0 && boundary_ / report_interval_ > began_ / report_interval_) {
    report_ = news_ = true;
  }
  boundary_ = kNoTicks;
}

void SimulatedEngine::say(std::vector<Word>& words) {
  const auto ended = [&](Sequence& sequence) {
    const std::int64_t tokens = sequence.made - sequence.reported;
    EndReason reason = EndReason::kNone;
    if (sequence.aborted) {
      reason = EndReason::kFailed;
    } else if (sequence.made == sequence.goal) {
      reason = sequence.ends;
    } else if (sequence.pausing) {
      reason = EndReason::kPaused;
    } else if (!report_ || tokens == 0) {
      return false;
    }
    words.push_back({sequence, tokens, reason});
    sequence.reported = sequence.made;
    return reason != EndReason::kNone;
  };
  std::erase_if(running_, [&](Sequence& sequence) {
    if (!ended(sequence)) return false;
    kv_ -= sequence.context + sequence.made;
    return true;
  });
  std::erase_if(waiting_, ended);
  report_ = news_ = false;
}

// As vLLM does: the last admitted gives way, and is the first to come back, computed again. It is
// not in the same step: it did not fit.
void SimulatedEngine::preempt() {
  while (kv_ > kv_capacity_ && running_.size() > 1) {
    Sequence youngest = running_.back();
    running_.pop_back();
    kv_ -= youngest.context + youngest.made;
    youngest.preempted = true;
    waiting_.push_front(youngest);
  }
}

void SimulatedEngine::admit() {
  while (!waiting_.empty() && running_.size() < max_sequences_) {
    const Sequence& next = waiting_.front();
    const std::int64_t held = next.context + next.made;
    if (kv_ + held > kv_capacity_ && !running_.empty()) return;
    kv_ += held;
    prefill_ += held;
    prefilled_ += held;
    if (next.preempted) preempted_ += held;
    running_.push_back(next);
    waiting_.pop_front();
  }
}

void SimulatedEngine::begin(Ticks now) {
  prefill_ = 0;
  preempt();
  admit();
  if (!running_.empty()) plan(now);
}

void SimulatedEngine::plan(Ticks now) {
  began_ = now;
  steps_ = std::numeric_limits<std::int64_t>::max();
  for (const Sequence& sequence : running_) {
    steps_ = std::min(steps_, sequence.goal - sequence.made);
  }
  // Who waits here waits for room, which only an end or a command makes. The cache overflows when
  // the tokens of the next step do not fit; one sequence alone has been checked to fit.
  const auto batch = static_cast<std::int64_t>(running_.size());
  if (batch > 1) steps_ = std::min(steps_, (kv_capacity_ - kv_) / batch + 1);
  if (report_interval_ > 0) {
    const Ticks due = report_interval_ - now % report_interval_;
    if (duration(steps_) > due) steps_ = steps_until(due);
  }
  const Ticks taken = duration(steps_);
  boundary_ = taken < kMaxTicks - now ? now + taken : kMaxTicks;
}

}  // namespace kimisys::rollout
