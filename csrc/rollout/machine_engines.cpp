// Engines: who serves, who is to take a version, who leaves.
#include <algorithm>

#include "base/error.h"
#include "rollout/machine.h"

namespace kimisys::rollout {
namespace {

constexpr auto kCode = ErrorCode::kScheduler;
constexpr std::int64_t kMostCapacity = std::int64_t{1} << 50;
constexpr std::int64_t kMostSequences = std::int64_t{1} << 31;
constexpr std::int64_t kLastVersion = std::int64_t{1} << 61;

}  // namespace

Engine& Machine::known(const Event& event) {
  const auto found = engines_by_id.find(event.engine);
  KIMISYS_CHECK(found != engines_by_id.end(), kCode, "event ", name(event.kind), ": engine ",
                event.engine, " never joined; send engine_joined first");
  return state.engines[found->second];
}

bool Machine::joined(const Event& event) {
  const auto found = engines_by_id.find(event.engine);
  KIMISYS_CHECK(event.engine != kNoEngine, kCode, "event engine_joined: engine ", event.engine,
                " is the id that stands for none; choose another");
  KIMISYS_CHECK(
      found == engines_by_id.end() || state.engines[found->second].phase == EnginePhase::kGone,
      kCode, "event engine_joined: engine ", event.engine,
      " is there already; say engine_failed first if it started anew");
  KIMISYS_CHECK(event.tokens >= 1 && event.tokens <= kMostCapacity, kCode,
                "event engine_joined: engine ", event.engine, " has a KV cache of ", event.tokens,
                " tokens; it must be from 1 to ", kMostCapacity);
  KIMISYS_CHECK(event.count >= 1 && event.count <= kMostSequences, kCode,
                "event engine_joined: engine ", event.engine, " takes ", event.count,
                " sequences; it must be from 1 to ", kMostSequences);
  KIMISYS_CHECK(event.version >= kNoVersion && event.version <= kLastVersion &&
                    (state.version == kNoVersion || event.version <= state.version),
                kCode, "event engine_joined: engine ", event.engine, " serves version ",
                event.version, " and the newest is ", state.version,
                "; publish a version before an engine serves it, -1 is none");

  const std::uint32_t place = found != engines_by_id.end()
                                  ? found->second
                                  : static_cast<std::uint32_t>(state.engines.size());
  if (found == engines_by_id.end()) {
    state.engines.emplace_back();
    engines_by_id.emplace(event.engine, place);
  }
  Engine& engine = state.engines[place];
  engine = Engine{};
  engine.id = event.engine;
  engine.phase = EnginePhase::kServing;
  engine.version = event.version;
  engine.kv_capacity = event.tokens;
  engine.max_sequences = event.count;
  engine.since = state.now;
  if (engine.version == kNoVersion) engine.phase = EnginePhase::kUpdating;
  ++active;
  if (state.version == kNoVersion) state.version = event.version;
  follow();
  return true;
}

bool Machine::left(const Event& event) {
  Engine& engine = known(event);
  KIMISYS_CHECK(engine.phase == EnginePhase::kServing || engine.phase == EnginePhase::kUpdating,
                kCode, "event engine_left: engine ", event.engine, " has left since ", engine.since,
                " us; say it once");
  engine.phase = EnginePhase::kLeaving;
  engine.since = state.now;
  engine.asked = kNoVersion;
  --active;
  pause_all(engine);
  if (engine.leases.empty()) idle(engine);
  return true;
}

bool Machine::failed(const Event& event) {
  Engine& engine = known(event);
  KIMISYS_CHECK(engine.phase != EnginePhase::kGone, kCode, "event engine_failed: engine ",
                event.engine, " is gone since ", engine.since,
                " us; it joins before it fails again");
  if (engine.phase != EnginePhase::kLeaving) --active;
  // Before its leases end, so that the last of them does not make it take a version.
  engine.phase = EnginePhase::kLeaving;
  engine.since = state.now;
  engine.asked = kNoVersion;
  while (!engine.leases.empty()) requeue(engine.leases.front());
  engine.phase = EnginePhase::kGone;
  return true;
}

bool Machine::updated(const Event& event) {
  Engine& engine = known(event);
  const bool lost = engine.phase == EnginePhase::kGone || engine.phase == EnginePhase::kLeaving;
  if (lost || (engine.asked == kNoVersion && event.version == engine.version)) {
    ++ledger.late;
    return false;
  }
  KIMISYS_CHECK(engine.asked != kNoVersion, kCode, "event engine_updated: engine ", event.engine,
                " was not asked to take version ", event.version,
                "; let it take versions only on the action update");
  KIMISYS_CHECK(event.version >= engine.asked && event.version <= state.version, kCode,
                "event engine_updated: engine ", event.engine, " serves version ", event.version,
                " after it was asked to take ", engine.asked, " and the newest is ", state.version,
                "; publish a version before an engine serves it");
  engine.version = event.version;
  engine.asked = kNoVersion;
  engine.since = state.now;
  // Published meanwhile: it takes that too before it serves.
  if (engine.version < state.version) {
    ask(engine);
  } else {
    engine.phase = EnginePhase::kServing;
  }
  return true;
}

bool Machine::reported(const Event& event) {
  Engine& engine = known(event);
  KIMISYS_CHECK(event.tokens >= 0 && event.tokens <= kMostCapacity, kCode,
                "event engine_stats: engine ", event.engine, " has ", event.tokens,
                " KV tokens in use; it must be from 0 to ", kMostCapacity);
  if (engine.phase == EnginePhase::kGone) {
    ++ledger.late;
    return false;
  }
  const std::int64_t before = engine.kv_unheard;
  engine.kv_unheard = std::max<std::int64_t>(0, event.tokens - engine.kv_tokens);
  return engine.kv_unheard < before;  // there is room for what waits
}

bool Machine::published(const Event& event) {
  // What the first engine served when it joined may be published after that.
  const bool first = !first_published && event.version == state.version;
  KIMISYS_CHECK(event.version >= 0 && event.version <= kLastVersion &&
                    (event.version > state.version || first),
                kCode, "event version_published: version ", event.version, " after ", state.version,
                "; versions are not negative and increase");
  first_published = true;
  trains = false;
  state.version = event.version;
  drop_stale();
  follow();
  return true;
}

void Machine::follow() {
  for (Engine& engine : state.engines) {
    if (engine.phase == EnginePhase::kServing && engine.version < state.version) {
      engine.phase = EnginePhase::kUpdating;
      engine.since = state.now;
      if (state.config.update == Update::kInterrupt) pause_all(engine);
    }
    ask(engine);
  }
}

void Machine::ask(Engine& engine) {
  const bool may = engine.phase == EnginePhase::kUpdating && engine.leases.empty() &&
                   engine.asked == kNoVersion && engine.version < state.version;
  if (!may) return;
  engine.asked = state.version;
  Action& action = act(ActionKind::kUpdate);
  action.engine = engine.id;
  action.version = state.version;
}

void Machine::idle(Engine& engine) {
  if (engine.phase == EnginePhase::kLeaving) {
    engine.phase = EnginePhase::kGone;
    engine.since = state.now;
  }
  ask(engine);
}

void Machine::pause_all(const Engine& engine) {
  for (const Slot slot : engine.leases) pause(slot);
}

}  // namespace kimisys::rollout
