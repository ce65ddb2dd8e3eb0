// Short hands for scheduler tests: events as calls, actions as text.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "rollout/scheduler.h"
#include "rollout/state.h"

namespace kimisys::rollout::test {

inline Config whole(std::int64_t groups) {
  Config config;
  config.groups = groups;
  config.placement = Placement::kLeastLoaded;
  config.order = Order::kFifo;
  config.concurrency = Concurrency::kFixed;
  config.lease_timeout = 1000;
  return config;
}

inline Config budget(std::int64_t tokens) {
  Config config = whole(0);
  config.token_budget = tokens;
  return config;
}

inline Event event(EventKind kind, EngineId engine = kNoEngine) {
  Event result;
  result.kind = kind;
  result.engine = engine;
  return result;
}

// "start e0 g7.1 <16" and the like; what an action does not say is left out.
inline std::string text(const Action& action) {
  std::ostringstream stream;
  stream << name(action.kind);
  if (action.engine != kNoEngine) stream << " e" << action.engine;
  if (action.lease != kNoLease) stream << " g" << action.group << '.' << action.sample;
  switch (action.kind) {
    case ActionKind::kStart:
      stream << " <" << action.limit;
      break;
    case ActionKind::kContinue:
      stream << " +" << action.tokens << " <" << action.limit;
      break;
    case ActionKind::kRequeue:
      stream << " +" << action.tokens;
      break;
    case ActionKind::kHandOver:
      stream << " g" << action.group << " x" << action.count << " +" << action.tokens << " v"
             << action.version;
      break;
    case ActionKind::kBatch:
      stream << " x" << action.count << " +" << action.tokens;
      break;
    case ActionKind::kDrop:
      stream << " g" << action.group << ' ' << name(action.drop);
      break;
    case ActionKind::kUpdate:
      stream << " v" << action.version;
      break;
    case ActionKind::kWant:
      stream << ' ' << action.count;
      break;
    default:
      break;
  }
  return stream.str();
}

// A scheduler with a clock that the test moves, audited after every event.
struct World {
  explicit World(const Config& config) : scheduler(config) {}

  // What the event caused, "; " between actions.
  std::string send(Event event) {
    event.time = now;
    std::vector<Action> made;
    scheduler.handle(event, made);
    scheduler.audit();
    std::string result;
    for (const Action& action : made) {
      if (!result.empty()) result += "; ";
      result += text(action);
      if (action.kind == ActionKind::kStart || action.kind == ActionKind::kContinue) {
        leases.push_back(action.lease);
      }
    }
    actions.insert(actions.end(), made.begin(), made.end());
    return result;
  }

  std::string join(EngineId engine, std::int64_t sequences = 4, std::int64_t version = 0) {
    Event e = event(EventKind::kEngineJoined, engine);
    e.tokens = 1 << 20;
    e.count = sequences;
    e.version = version;
    return send(e);
  }
  std::string offer(GroupId group, std::int64_t samples = 1, std::int64_t limit = 100,
                    std::int64_t prompt = 10) {
    Event e = event(EventKind::kOffered);
    e.id = group;
    e.count = samples;
    e.limit = limit;
    e.tokens = prompt;
    return send(e);
  }
  std::string tokens(Lease lease, std::int64_t count) {
    Event e = event(EventKind::kTokens);
    e.id = lease;
    e.tokens = count;
    return send(e);
  }
  std::string end(Lease lease, EndReason reason, std::int64_t count = 0) {
    Event e = event(EventKind::kSegmentEnded);
    e.id = lease;
    e.tokens = count;
    e.reason = reason;
    return send(e);
  }
  std::string ready() { return send(event(EventKind::kTrainerReady)); }
  std::string time() { return send(event(EventKind::kTime)); }
  std::string left(EngineId engine) { return send(event(EventKind::kEngineLeft, engine)); }
  std::string failed(EngineId engine) { return send(event(EventKind::kEngineFailed, engine)); }
  std::string updated(EngineId engine, std::int64_t version) {
    Event e = event(EventKind::kEngineUpdated, engine);
    e.version = version;
    return send(e);
  }
  std::string stats(EngineId engine, std::int64_t kv_tokens) {
    Event e = event(EventKind::kEngineStats, engine);
    e.tokens = kv_tokens;
    return send(e);
  }
  std::string publish(std::int64_t version) {
    Event e = event(EventKind::kVersionPublished);
    e.version = version;
    return send(e);
  }

  Scheduler scheduler;
  std::int64_t now = 0;
  std::vector<Action> actions;
  std::vector<Lease> leases;  // as they were given
};

}  // namespace kimisys::rollout::test
