// The simulator again, token by token and with nothing kept that can be counted anew: what the
// one that jumps is compared with.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "rollout/scheduler.h"
#include "rollout/simulated_engine.h"
#include "rollout/simulator.h"

namespace kimisys::test {

using namespace rollout;  // NOLINT: the reference speaks of nothing else

struct NaiveSequence {
  Lease lease;
  std::int64_t group, sample;
  std::int64_t before;   // output tokens when the lease began
  std::int64_t allowed;  // new tokens
  std::int64_t made = 0, told = 0;
  bool pausing = false, aborted = false, preempted = false;
};

struct NaiveEngine {
  EngineModel model;
  std::vector<NaiveSequence> running, waiting;
  Ticks step_began = 0, step_ends = kNoTicks;
  bool report = false;
  bool up = false, updating = false;
  std::int64_t update = kNoVersion, version = kNoVersion;
  std::uint64_t life = 0;
  Ticks busy = 0;
};

class NaiveWorld {
 public:
  NaiveWorld(const Simulation& simulation, const Lots& lots)
      : simulation_(simulation), lots_(lots), scheduler_(simulation.config) {
    for (const EngineModel& model : simulation.engines) engines_.push_back({model, {}, {}});
    interval_ = ticks_of(simulation.report_interval);
    if (!simulation.oracle) return;
    scheduler_.reveal([this](GroupId group, std::uint32_t sample) {
      const std::size_t samples = static_cast<std::size_t>(lots_.samples);
      return std::min(lots_.limit,
                      lots_.lengths[static_cast<std::size_t>(group) * samples + sample]);
    });
  }

  Outcome run() {
    for (const Outage& outage : simulation_.outages) {
      at(ticks_of(outage.time), [this, outage] { fail(outage.engine); });
      at(ticks_of(outage.until), [this, outage] { join(outage.engine); });
    }
    tell(EventKind::kVersionPublished, kNoEngine, 0, 0, 0, EndReason::kNone, version_);
    for (EngineId e = 0; e < engines_.size(); ++e) join(e);
    tell(EventKind::kTrainerReady);
    moment();
    while (!done_) {
      Ticks next = diary_.empty() ? kNoTicks : diary_.begin()->first;
      for (const NaiveEngine& engine : engines_) next = std::min(next, engine.step_ends);
      const std::int64_t deadline = scheduler_.next_deadline();
      if (deadline < kMaxTicks / kTicksPerMicrosecond) {
        next = std::min(next, deadline * kTicksPerMicrosecond);
      }
      REQUIRE(next != kNoTicks);
      now_ = next;
      for (NaiveEngine& engine : engines_) {
        if (engine.step_ends == now_) finish_step(engine);
      }
      moment();
    }
    for (EngineId e = 0; e < engines_.size(); ++e) {
      NaiveEngine& engine = engines_[e];
      if (engine.step_ends != kNoTicks) engine.busy += now_ - engine.step_began;
      outcome_.busy.push_back(seconds_of(engine.busy));
    }
    outcome_.ledger = scheduler_.ledger();
    outcome_.digest = scheduler_.digest();
    scheduler_.audit();
    return outcome_;
  }

 private:
  std::int64_t length(const NaiveSequence& s) const {
    return lots_.lengths[static_cast<std::size_t>(s.group * lots_.samples + s.sample)];
  }
  std::int64_t held(const NaiveSequence& s) const {
    return lots_.prompt_tokens[static_cast<std::size_t>(s.group)] + s.before + s.made;
  }
  std::int64_t held(const NaiveEngine& engine) const {
    std::int64_t sum = 0;
    for (const NaiveSequence& s : engine.running) sum += held(s);
    return sum;
  }

  template <typename Action>
  void at(Ticks time, Action action) {
    diary_.emplace(time, action);
  }

  void tell(EventKind kind, EngineId engine = kNoEngine, std::uint64_t id = 0,
            std::int64_t tokens = 0, std::int64_t count = 0, EndReason reason = EndReason::kNone,
            std::int64_t version = kNoVersion, std::int64_t limit = 0) {
    Event event;
    event.time = now_ / kTicksPerMicrosecond;
    event.kind = kind;
    event.engine = engine;
    event.id = id;
    event.tokens = tokens;
    event.count = count;
    event.reason = reason;
    event.version = version;
    event.limit = limit;
    post_.push_back(event);
  }

  void moment() {
    while (!done_) {
      if (!post_.empty()) {
        deliver();
      } else if (!diary_.empty() && diary_.begin()->first <= now_) {
        const auto action = diary_.begin()->second;
        diary_.erase(diary_.begin());
        action();
      } else if (!news()) {
        if (scheduler_.next_deadline() > now_ / kTicksPerMicrosecond) break;
        tell(EventKind::kTime);
      }
    }
    if (done_) return;
    for (EngineId e = 0; e < engines_.size(); ++e) begin_step(e);
  }

  void deliver() {
    const std::vector<Event> events = std::exchange(post_, {});
    std::vector<Action> actions;
    std::size_t taken = 0;
    scheduler_.handle(events, actions, taken);
    outcome_.events += static_cast<std::int64_t>(events.size());
    for (const Action& action : actions) obey(action);
  }

  void obey(const Action& action) {
    if (action.kind == ActionKind::kStart || action.kind == ActionKind::kContinue) {
      engines_[action.engine].waiting.push_back({action.lease,
                                                 static_cast<std::int64_t>(action.group),
                                                 action.sample, action.tokens, action.limit});
    } else if (action.kind == ActionKind::kPause || action.kind == ActionKind::kAbort) {
      NaiveEngine& engine = engines_[action.engine];
      for (auto* list : {&engine.running, &engine.waiting}) {
        for (NaiveSequence& s : *list) {
          if (s.lease != action.lease) continue;
          (action.kind == ActionKind::kPause ? s.pausing : s.aborted) = true;
        }
      }
    } else if (action.kind == ActionKind::kUpdate) {
      engines_[action.engine].update = action.version;
    } else if (action.kind == ActionKind::kWant) {
      for (std::int64_t i = 0; i < action.count && offered_ < lots_.prompt_tokens.size(); ++i) {
        tell(EventKind::kOffered, kNoEngine, offered_, lots_.prompt_tokens[offered_], lots_.samples,
             EndReason::kNone, kNoVersion, lots_.limit);
        ++offered_;
      }
    } else if (action.kind == ActionKind::kBatch) {
      batch(action);
    }
  }

  void batch(const Action& action) {
    outcome_.rollout_seconds.push_back(seconds_of(now_ - ready_));
    outcome_.tokens.push_back(action.tokens);
    outcome_.groups.push_back(action.count);
    const Ticks trained =
        now_ + ticks_of(simulation_.train_base +
                        simulation_.train_token * static_cast<double>(action.tokens) +
                        simulation_.reward_latency);
    if (static_cast<std::int64_t>(outcome_.tokens.size()) == simulation_.iterations) {
      done_ = true;
      outcome_.seconds = seconds_of(trained);
      return;
    }
    at(trained, [this] {
      ready_ = now_;
      ++version_;
      tell(EventKind::kVersionPublished, kNoEngine, 0, 0, 0, EndReason::kNone, version_);
      tell(EventKind::kTrainerReady);
    });
  }

  void join(EngineId e) {
    NaiveEngine& engine = engines_[e];
    engine.up = true;
    engine.version = version_;
    tell(EventKind::kEngineJoined, e, 0, engine.model.kv_capacity, engine.model.max_sequences,
         EndReason::kNone, version_);
  }

  void fail(EngineId e) {
    const NaiveEngine old = engines_[e];
    engines_[e] = {old.model, {}, {}};
    engines_[e].life = old.life + 1;
    engines_[e].busy = old.busy + (old.step_ends == kNoTicks ? 0 : now_ - old.step_began);
    tell(EventKind::kEngineFailed, e);
  }

  void finish_step(NaiveEngine& engine) {
    for (NaiveSequence& s : engine.running) {
      ++s.made;
      ++outcome_.decoded;
    }
    engine.busy += now_ - engine.step_began;
    engine.report = interval_ > 0 && now_ / interval_ > engine.step_began / interval_;
    engine.step_ends = kNoTicks;
  }

  // What the first engine with something to say says.
  bool news() {
    for (EngineId e = 0; e < engines_.size(); ++e) {
      NaiveEngine& engine = engines_[e];
      if (engine.step_ends != kNoTicks) continue;
      bool any = false;
      const bool report = std::exchange(engine.report, false);
      for (auto* list : {&engine.running, &engine.waiting}) {
        for (std::size_t i = 0; i < list->size();) {
          any |= say(e, (*list)[i], report);
          const bool gone = (*list)[i].lease == kNoLease;
          if (gone) list->erase(list->begin() + static_cast<std::ptrdiff_t>(i));
          any |= gone;
          if (!gone) ++i;
        }
      }
      if (any) return true;
    }
    return false;
  }

  bool say(EngineId e, NaiveSequence& s, bool report) {
    if (s.aborted) {
      s.lease = kNoLease;
      return true;
    }
    const std::int64_t output = s.before + s.made;
    EndReason reason = EndReason::kNone;
    if (output == length(s) && length(s) <= lots_.limit) {
      reason = EndReason::kStop;
    } else if (s.made == s.allowed || output == lots_.limit) {
      reason = EndReason::kLength;
    } else if (s.pausing) {
      reason = EndReason::kPaused;
    }
    const std::int64_t tokens = s.made - s.told;
    if (reason != EndReason::kNone) {
      tell(EventKind::kSegmentEnded, e, s.lease, tokens, 0, reason);
      s.lease = kNoLease;
      return true;
    }
    if (!report || tokens == 0) return false;
    tell(EventKind::kTokens, e, s.lease, tokens);
    s.told = s.made;
    return true;
  }

  void begin_step(EngineId e) {
    NaiveEngine& engine = engines_[e];
    if (!engine.up || engine.updating || engine.step_ends != kNoTicks) return;
    if (engine.update != kNoVersion && engine.running.empty() && engine.waiting.empty()) {
      engine.updating = true;
      const std::int64_t version = std::exchange(engine.update, kNoVersion);
      const std::uint64_t life = engine.life;
      at(now_ + ticks_of(engine.model.update), [this, e, version, life] {
        if (engines_[e].life != life) return;
        engines_[e].updating = false;
        engines_[e].version = version;
        tell(EventKind::kEngineUpdated, e, 0, 0, 0, EndReason::kNone, version);
      });
      return;
    }
    const std::int64_t prefill = admit(engine);
    if (engine.running.empty()) return;
    const StepCosts costs(engine.model);
    Ticks taken = costs.step + costs.prefill_token * prefill;
    for (const NaiveSequence& s : engine.running) {
      taken += costs.sequence + costs.kv_token * held(s);
    }
    engine.step_began = now_;
    engine.step_ends = now_ + taken;
  }

  std::int64_t admit(NaiveEngine& engine) {
    bool preempted = false;
    while (held(engine) > engine.model.kv_capacity) {
      engine.running.back().preempted = true;
      engine.waiting.insert(engine.waiting.begin(), engine.running.back());
      engine.running.pop_back();
      preempted = true;
    }
    std::int64_t prefill = 0;
    while (!preempted && !engine.waiting.empty() &&
           static_cast<std::int64_t>(engine.running.size()) < engine.model.max_sequences &&
           held(engine) + held(engine.waiting.front()) <= engine.model.kv_capacity) {
      prefill += held(engine.waiting.front());
      if (engine.waiting.front().preempted) outcome_.preempted += held(engine.waiting.front());
      engine.running.push_back(engine.waiting.front());
      engine.waiting.erase(engine.waiting.begin());
    }
    outcome_.prefilled += prefill;
    return prefill;
  }

  const Simulation& simulation_;
  const Lots& lots_;
  Scheduler scheduler_;
  std::vector<NaiveEngine> engines_;
  std::multimap<Ticks, std::function<void()>> diary_;  // of equal times: in the order of entry
  std::vector<Event> post_;
  Ticks now_ = 0, ready_ = 0, interval_ = 0;
  std::int64_t version_ = 0;
  std::uint64_t offered_ = 0;
  bool done_ = false;
  Outcome outcome_;
};

}  // namespace kimisys::test
