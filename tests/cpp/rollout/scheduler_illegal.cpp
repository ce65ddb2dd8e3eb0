// Events that no correct caller sends.
#include <limits>
#include <stdexcept>

#include "base/error.h"
#include "rollout/scheduler_toys.h"
#include "rollout/scheduler_world.h"

namespace kimisys::rollout::test {

void Toys::expect_refused(Event bad) {
  if (bad.time == 0) bad.time = now_;
  const std::uint64_t digest = scheduler_.digest();
  const std::int64_t deadline = scheduler_.next_deadline();
  std::vector<Action> none;
  bool refused = false;
  try {
    scheduler_.handle(bad, none);
  } catch (const Error& error) {
    refused = error.code() == ErrorCode::kScheduler;
  }
  const bool changed =
      !none.empty() || scheduler_.digest() != digest || scheduler_.next_deadline() != deadline;
  if (!refused || changed) {
    throw std::runtime_error(std::string("a bad event of kind ") + name(bad.kind) +
                             (refused ? " changed something" : " was taken"));
  }
  scheduler_.audit();
  ++refused_;
}

Event Toys::illegal() {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  constexpr std::int64_t kLow = std::numeric_limits<std::int64_t>::min();
  const auto& groups = model_.groups();
  const auto& leases = model_.leases();
  switch (draw(0, 7)) {
    case 0: {
      Event e = one_in(2) ? offer() : event(EventKind::kTime);
      const std::int64_t last = events_.empty() ? 0 : events_.back().time;
      e.time = one_in(2) && last > 1 ? last - 1 : kHuge;
      return e;
    }
    case 1: {
      Event e = offer();
      if (!groups.empty() && one_in(2)) {
        e.id = groups.begin()->first;
        return e;
      }
      const std::int64_t bad = one_in(3) ? 0 : one_in(2) ? kLow : kHuge;
      (one_in(2) ? e.count : e.limit) = bad;
      if (one_in(4)) e.tokens = one_in(2) ? -1 : kHuge;
      return e;
    }
    case 2: {  // a lease that was never given
      Event e = event(one_in(2) ? EventKind::kTokens : EventKind::kSegmentEnded);
      e.reason = EndReason::kStop;
      e.id = leases.empty() || one_in(2) ? random_() | (std::uint64_t{1} << 60U)
                                         : leases.begin()->first + 1000;
      return e;
    }
    case 3:
    case 4: {
      if (leases.empty()) return illegal_engine();
      Event e = event(one_in(2) ? EventKind::kTokens : EventKind::kSegmentEnded);
      e.reason = EndReason::kStop;
      const auto& [lease, entry] = *leases.begin();
      e.id = lease;
      e.tokens = one_in(3) ? entry.limit - entry.made + 1 : one_in(2) ? kHuge : -draw(1, 9);
      return e;
    }
    case 5: {
      if (leases.empty()) return illegal_engine();
      Event e = event(EventKind::kSegmentEnded);
      const auto& [lease, entry] = *leases.rbegin();
      e.id = lease;
      e.reason = one_in(2) ? EndReason::kNone : static_cast<EndReason>(draw(6, 1000));
      if (entry.made < entry.limit && one_in(2)) e.reason = EndReason::kLength;
      return e;
    }
    case 6:
      if (model_.ready()) return event(EventKind::kTrainerReady);
      return event(static_cast<EventKind>(draw(11, 1000)));
    default:
      return illegal_engine();
  }
}

Event Toys::illegal_engine() {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  const auto engine = static_cast<EngineId>(draw(0, 3));
  const auto found = model_.engines().find(engine);
  const bool there = found != model_.engines().end() && found->second.there;
  switch (draw(0, 4)) {
    case 0: {
      Event e = join(engine);
      if (there) return e;
      if (one_in(2)) {
        e.tokens = one_in(2) ? 0 : kHuge;
      } else if (one_in(2)) {
        e.count = one_in(2) ? -1 : kHuge;
      } else {
        e.version = one_in(2) ? -2 : kHuge;
      }
      return e;
    }
    case 1:
      return event(one_in(2) ? EventKind::kEngineFailed : EventKind::kEngineLeft,
                   there && !one_in(2) ? kNoEngine : 99);
    case 2: {
      Event e = event(EventKind::kEngineUpdated, there ? engine : 99);
      e.version = one_in(2) ? kHuge : -7;
      // Of an engine that leaves, any word on versions is late.
      if (there && found->second.leaving) e.engine = 99;
      return e;
    }
    case 3: {
      Event e = event(EventKind::kVersionPublished);
      e.version = one_in(2) ? model_.newest() - 1 : one_in(2) ? -5 : kHuge;
      return e;
    }
    default: {
      Event e = event(EventKind::kEngineStats, there ? engine : 99);
      e.tokens = one_in(2) ? -1 : kHuge;
      return e;
    }
  }
}

}  // namespace kimisys::rollout::test
