// What the scheduler is told (events) and what it answers (actions): plain records of one size, so
// that a trace of them is an array, in a file as in memory.
#pragma once

#include <cstdint>
#include <limits>

namespace kimisys::rollout {

using EngineId = std::uint32_t;  // chosen by the caller
using GroupId = std::uint64_t;   // chosen by the caller: a prompt's k samples
using Lease = std::uint64_t;     // one attempt at a segment; made by the scheduler, never reused

constexpr EngineId kNoEngine = std::numeric_limits<EngineId>::max();
constexpr Lease kNoLease = std::numeric_limits<Lease>::max();
constexpr std::int64_t kNoVersion = -1;
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

enum class EventKind : std::uint32_t {
  kTime,           // time passes: deadlines are looked at
  kOffered,        // a prompt: id, count (samples), tokens (of the prompt), limit (of each output)
  kTokens,         // a lease made `tokens` more output tokens
  kSegmentEnded,   // a lease ended: id, reason; tokens: those since its last kTokens
  kEngineJoined,   // engine, version that it serves, tokens (KV capacity), count (most sequences)
  kEngineLeft,     // engine takes nothing new; what runs there is paused and goes elsewhere
  kEngineFailed,   // engine is gone, with what ran there
  kEngineUpdated,  // engine serves `version`
  kVersionPublished,  // the trainer published `version`: engines are to follow
  kTrainerReady,      // the trainer takes a batch; with it an iteration begins
  kEngineStats,       // engine: tokens (of KV in use, as the engine counts)
};

enum class EndReason : std::uint32_t {
  kNone,
  kStop,        // the model ended it
  kLength,      // the lease's limit was reached
  kPaused,      // as asked
  kRepetition,  // the detector saw a loop; the trajectory is finished
  kFailed,      // the engine refused or lost it; what it made is kept, the rest is tried again
};

struct Event {
  std::int64_t time = 0;  // microseconds of any clock that does not go back
  EventKind kind = EventKind::kTime;
  EngineId engine = kNoEngine;
  std::uint64_t id = 0;  // the group offered, or the lease
  std::int64_t tokens = 0;
  std::int64_t limit = 0;
  std::int64_t count = 0;
  std::int64_t version = kNoVersion;
  EndReason reason = EndReason::kNone;
  std::uint32_t unused = 0;  // no padding: a record has one form in bytes
};
static_assert(sizeof(Event) == 64);

enum class ActionKind : std::uint32_t {
  kStart,     // begin a trajectory: engine, lease, group, sample; limit: most new tokens
  kContinue,  // as kStart, with the prompt and the `tokens` output tokens that are kept
  kPause,     // end the lease at its engine soon; what it has made is kept (kSegmentEnded tells)
  kAbort,     // the lease is dead: the engine may forget it, whatever still comes is ignored
  kRequeue,   // for the log: the trajectory of a dead lease waits again; tokens: kept
  kHandOver,  // a finished group, to the trainer; version: lowest that made a token of it
  kBatch,     // the trainer's batch is complete: count groups, tokens of output
  kDrop,      // a group that will not be trained: drop says why
  kUpdate,    // the engine is idle: let it take `version`, then tell kEngineUpdated
  kWant,      // offer `count` more prompts
};

enum class DropReason : std::uint32_t {
  kNone,
  kStale,     // older than the bound on staleness allows
  kFailures,  // a segment failed `max_failures` times in a row
  kEmpty,     // nothing of it was made, and nothing will be
};

struct Action {
  ActionKind kind = ActionKind::kStart;
  EngineId engine = kNoEngine;
  Lease lease = kNoLease;
  GroupId group = 0;
  std::int64_t tokens = 0;
  std::int64_t limit = 0;
  std::int64_t deadline = kNever;  // microseconds: when the lease dies unless it is heard of
  std::int64_t version = kNoVersion;
  std::int64_t count = 0;
  std::uint32_t sample = 0;  // of the group
  DropReason drop = DropReason::kNone;
};
static_assert(sizeof(Action) == 72);

const char* name(EventKind kind);
const char* name(EndReason reason);
const char* name(ActionKind kind);
const char* name(DropReason reason);

}  // namespace kimisys::rollout
