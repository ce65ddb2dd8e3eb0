// The names of the records' kinds, as Python, traces and messages spell them.
#include "rollout/types.h"

namespace kimisys::rollout {

const char* name(EventKind kind) {
  switch (kind) {
    case EventKind::kTime:
      return "time";
    case EventKind::kOffered:
      return "offered";
    case EventKind::kTokens:
      return "tokens";
    case EventKind::kSegmentEnded:
      return "segment_ended";
    case EventKind::kEngineJoined:
      return "engine_joined";
    case EventKind::kEngineLeft:
      return "engine_left";
    case EventKind::kEngineFailed:
      return "engine_failed";
    case EventKind::kEngineUpdated:
      return "engine_updated";
    case EventKind::kVersionPublished:
      return "version_published";
    case EventKind::kTrainerReady:
      return "trainer_ready";
    case EventKind::kEngineStats:
      return "engine_stats";
  }
  return "unknown";
}

const char* name(EndReason reason) {
  switch (reason) {
    case EndReason::kNone:
      return "none";
    case EndReason::kStop:
      return "stop";
    case EndReason::kLength:
      return "length";
    case EndReason::kPaused:
      return "paused";
    case EndReason::kRepetition:
      return "repetition";
    case EndReason::kFailed:
      return "failed";
  }
  return "unknown";
}

const char* name(ActionKind kind) {
  switch (kind) {
    case ActionKind::kStart:
      return "start";
    case ActionKind::kContinue:
      return "continue";
    case ActionKind::kPause:
      return "pause";
    case ActionKind::kAbort:
      return "abort";
    case ActionKind::kRequeue:
      return "requeue";
    case ActionKind::kHandOver:
      return "hand_over";
    case ActionKind::kBatch:
      return "batch";
    case ActionKind::kDrop:
      return "drop";
    case ActionKind::kUpdate:
      return "update";
    case ActionKind::kWant:
      return "want";
  }
  return "unknown";
}

const char* name(DropReason reason) {
  switch (reason) {
    case DropReason::kNone:
      return "none";
    case DropReason::kStale:
      return "stale";
    case DropReason::kFailures:
      return "failures";
    case DropReason::kEmpty:
      return "empty";
  }
  return "unknown";
}

}  // namespace kimisys::rollout
