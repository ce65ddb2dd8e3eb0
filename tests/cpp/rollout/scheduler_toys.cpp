#include "rollout/scheduler_toys.h"

#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "rollout/scheduler_world.h"

namespace kimisys::rollout::test {
namespace {

constexpr std::int64_t kTimeout = 1000;

}  // namespace

Config random_config(std::mt19937_64& random) {
  const auto draw = [&](std::uint32_t choices) {
    return static_cast<std::uint32_t>(random() % choices);
  };
  for (;;) {
    Config config;
    config.deployment = static_cast<Deployment>(draw(2));
    config.placement = static_cast<Placement>(draw(4));
    config.order = static_cast<Order>(draw(3));
    config.staleness = static_cast<Staleness>(draw(3));
    config.concurrency = static_cast<Concurrency>(draw(2));
    config.update = static_cast<Update>(draw(2));
    config.token_budget = draw(2) == 0 ? 0 : 1 + draw(200);
    config.groups = draw(5);
    config.over_issue = draw(2) == 0 ? 1.0 : 1.0 + 0.3 * draw(4);
    config.segment_tokens = draw(3) == 0 ? 1 + draw(12) : 0;
    config.live_limit = draw(4) == 0 ? 1 + draw(8) : 0;
    config.max_staleness = static_cast<std::int64_t>(draw(5)) - 1;
    config.lease_timeout = kTimeout;
    config.max_failures = 1 + draw(3);
    try {
      check(config);
      return config;
    } catch (const Error&) {
      // A contradiction: draw again.
    }
  }
}

Toys::Toys(const Config& config, std::uint64_t seed)
    : random_(seed), scheduler_(config), model_(config), config_(config), lengths_(seed) {}

std::int64_t Toys::draw(std::int64_t least, std::int64_t most) {
  return least +
         static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(most - least + 1));
}

void Toys::send(Event event) {
  event.time = now_;
  const std::size_t before = actions_.size();
  scheduler_.handle(event, actions_);
  events_.push_back(event);
  model_.observe(event, std::span(actions_).subspan(before), scheduler_);
  scheduler_.audit();
  for (std::size_t i = before; i < actions_.size(); ++i) take(actions_[i]);
}

void Toys::take(const Action& action) {
  if (action.kind == ActionKind::kStart || action.kind == ActionKind::kContinue) {
    Segment segment;
    segment.engine = action.engine;
    std::mt19937_64 of_it(lengths_ ^ (action.group << 16U) ^ action.sample);
    segment.length = of_it() % 12 == 0 ? 0 : static_cast<std::int64_t>(of_it() % 40);
    segment.tokens = action.tokens;
    segment.left = action.limit;
    segments_[action.lease] = segment;
  } else if (action.kind == ActionKind::kPause) {
    segments_.at(action.lease).pausing = true;
  } else if (action.kind == ActionKind::kAbort) {
    // Most forget it at once, some go on for a while: their words come late.
    if (patient_ || one_in(2)) segments_.erase(action.lease);
  } else if (action.kind == ActionKind::kUpdate) {
    asked_[action.engine] = action.version;
  }
}

// The engine goes on with a segment, and says so.
void Toys::make(Lease lease, Segment& segment) {
  if (segment.ended || segment.dead) return;
  Event said = event(EventKind::kTokens);
  said.id = lease;
  const std::int64_t most =
      std::min(segment.left, std::max<std::int64_t>(0, segment.length - segment.tokens));
  said.tokens = draw(0, std::min<std::int64_t>(most, patient_ ? 20 : 8));
  segment.tokens += said.tokens;
  segment.left -= said.tokens;
  const bool stops = segment.tokens >= segment.length;
  const bool tells_later = (stops || segment.left == 0) && said.tokens > 0 && one_in(3);
  if (tells_later) {
    segment.on_its_way.push_back(said);
    return;
  }
  if (stops || segment.left == 0 || (segment.pausing && one_in(2)) || (!patient_ && one_in(25))) {
    segment.ended = true;
    said.kind = EventKind::kSegmentEnded;
    said.reason = stops               ? (one_in(5) ? EndReason::kRepetition : EndReason::kStop)
                  : segment.left == 0 ? EndReason::kLength
                  : segment.pausing   ? EndReason::kPaused
                  : one_in(3)         ? EndReason::kPaused
                                      : EndReason::kFailed;
  }
  segment.on_its_way.push_back(said);
}

Event Toys::word() {
  std::vector<Lease> there;
  for (const auto& entry : segments_) there.push_back(entry.first);
  if (there.empty()) return event(EventKind::kTime);
  const Lease lease =
      there[static_cast<std::size_t>(draw(0, static_cast<std::int64_t>(there.size()) - 1))];
  Segment& segment = segments_.at(lease);
  make(lease, segment);
  if (segment.on_its_way.empty() || (!patient_ && one_in(4))) return event(EventKind::kTime);
  const Event said = segment.on_its_way.front();
  // An end that comes twice is of a dead lease the second time.
  const bool again = said.kind == EventKind::kSegmentEnded && !patient_ && one_in(6);
  if (!again) segment.on_its_way.pop_front();
  if (segment.on_its_way.empty() && (segment.ended || segment.dead)) segments_.erase(lease);
  return said;
}

Event Toys::join(EngineId engine) {
  Event e = event(EventKind::kEngineJoined, engine);
  e.tokens = draw(20, 400);
  e.count = draw(1, 6);
  const bool known = model_.newest() != kNoVersion;
  e.version = one_in(6) ? kNoVersion
              : known   ? std::max<std::int64_t>(0, model_.newest() - draw(0, 1))
                        : draw(0, 2);
  return e;
}

Event Toys::offer() {
  Event e = event(EventKind::kOffered);
  e.id = next_group_++;
  e.count = draw(1, 5);
  e.limit = draw(1, 30);
  e.tokens = draw(0, 20);
  return e;
}

Event Toys::publish() {
  Event e = event(EventKind::kVersionPublished);
  e.version = published_ =
      std::max<std::int64_t>(model_.newest(), published_) + (one_in(5) ? 2 : 1);
  return e;
}

Event Toys::engine_event() {
  const auto engine = static_cast<EngineId>(draw(0, 3));
  const auto found = model_.engines().find(engine);
  const bool there = found != model_.engines().end() && found->second.there;
  if (!there) return join(engine);
  const auto asked = asked_.find(engine);
  if (asked != asked_.end() && found->second.asked) {
    if (!patient_ && one_in(2)) return event(EventKind::kTime);
    Event e = event(EventKind::kEngineUpdated, engine);
    e.version = one_in(2) ? asked->second : model_.newest();
    asked_.erase(asked);
    return e;
  }
  if (patient_) return event(EventKind::kTime);
  if (one_in(12)) {
    for (auto& entry : segments_) {
      if (entry.second.engine == engine) entry.second.dead = true;
    }
    asked_.erase(engine);
    return event(EventKind::kEngineFailed, engine);
  }
  if (one_in(12) && !found->second.leaving) {
    asked_.erase(engine);
    return event(EventKind::kEngineLeft, engine);
  }
  Event stats = event(EventKind::kEngineStats, engine);
  stats.tokens = draw(0, 400);
  return stats;
}

Event Toys::next() {
  switch (draw(0, 19)) {
    case 0:
      return one_in(4) ? publish() : word();
    case 1:
    case 2:
      return engine_event();
    case 3:
      if (!model_.ready()) return event(EventKind::kTrainerReady);
      return word();
    case 4:
    case 5:
      return model_.debt() > 0 || one_in(6) ? offer() : word();
    case 6:
      return event(EventKind::kTime);
    default:
      return word();
  }
}

Event Toys::benign() {
  if (model_.debt() > 0) return offer();
  switch (draw(0, 9)) {
    case 0:
      if (!model_.ready()) return event(EventKind::kTrainerReady);
      return word();
    case 1:
    case 2:
    case 3:
      return engine_event();
    default:
      return word();
  }
}

void Toys::step(int illegal_per_mille) {
  now_ += one_in(60) ? kTimeout + 1 : draw(0, 40);
  if (illegal_per_mille > 0 && draw(0, 999) < illegal_per_mille) expect_refused(illegal());
  send(next());
}

bool Toys::finish(int steps) {
  patient_ = true;
  // Leases whose engines have forgotten them end by their deadlines.
  now_ += 2 * kTimeout;
  send(event(EventKind::kTime));
  const GroupId last = next_group_;
  for (int i = 0; i < steps; ++i) {
    const auto& groups = model_.groups();
    if (groups.empty() || groups.begin()->first >= last) return true;
    now_ += draw(0, 2);
    const std::int64_t batches = scheduler_.counts().iteration;
    send(benign());
    if (scheduler_.counts().iteration > batches) send(publish());
    if (scheduler_.next_deadline() <= now_) send(event(EventKind::kTime));
  }
  return false;
}

}  // namespace kimisys::rollout::test
