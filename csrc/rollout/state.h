// The scheduler's tables, which the policies read. Slots of trajectories and groups are reused; a
// lease names its slot and an epoch that never comes again, so what a dead attempt sends is known.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rollout/config.h"
#include "rollout/types.h"

namespace kimisys::rollout {

using Slot = std::uint32_t;  // of a trajectory or a group
constexpr Slot kNoSlot = 0xffffffffU;

enum class Phase : std::uint8_t { kFree, kWaiting, kRunning, kPausing, kFinished };

struct Trajectory {
  std::int64_t tokens = 0;                  // of output, in all segments
  std::int64_t limit = 0;                   // of output
  std::int64_t segment_start = 0;           // `tokens` when the lease began
  std::int64_t segment_limit = 0;           // most new tokens of the lease
  std::int64_t since = 0;                   // microseconds: when it came into its phase
  std::int64_t heard = 0;                   // microseconds: last word of its lease
  std::int64_t first_version = kNoVersion;  // that made a token of it
  Slot group = kNoSlot;
  std::uint32_t sample = 0;
  std::uint32_t epoch = 0;
  EngineId engine = kNoEngine;     // that runs it, or ran its last segment
  std::uint32_t engine_place = 0;  // of that engine in State::engines
  std::uint32_t lease_place = 0;   // of it in that engine's leases, while it is leased
  std::uint32_t failures = 0;      // in a row
  Phase phase = Phase::kFree;
  EndReason ended = EndReason::kNone;
};

constexpr bool leased(const Trajectory& trajectory) {
  return trajectory.phase == Phase::kRunning || trajectory.phase == Phase::kPausing;
}

struct Group {
  GroupId id = 0;
  std::uint64_t number = 0;  // in the order of the offers
  std::int64_t prompt_tokens = 0;
  std::int64_t offered = 0;  // microseconds
  std::int64_t first_version = kNoVersion;
  std::vector<Slot> trajectories;  // by sample
  std::uint32_t finished = 0;
  std::int64_t round = 0;  // the iteration in which it was admitted
  bool admitted = false;   // its trajectories may be leased
  bool used = false;       // the slot
};

// kUpdating: it is to take a version as soon as it is idle, and gets nothing new. kLeaving: it gets
// nothing new, ever.
enum class EnginePhase : std::uint8_t { kGone, kServing, kUpdating, kLeaving };

struct Engine {
  EngineId id = kNoEngine;
  EnginePhase phase = EnginePhase::kGone;
  std::int64_t version = kNoVersion;
  std::int64_t kv_capacity = 0;  // tokens
  std::int64_t max_sequences = 0;
  std::int64_t asked = kNoVersion;  // the version it was told to take, until it has
  std::int64_t kv_tokens = 0;       // prompts and outputs of its leases
  std::int64_t kv_unheard = 0;      // KV tokens that it said were in use beyond those
  std::int64_t sequences = 0;       // leases
  std::int64_t pausing = 0;         // of those, asked to pause
  std::int64_t since = 0;           // microseconds: when it came into its phase
  std::vector<Slot> leases;         // in no order
};

struct State {
  Config config;
  std::int64_t now = 0;
  std::int64_t version = kNoVersion;  // the newest: published, or served by the first engine
  std::vector<Trajectory> trajectories;
  std::vector<Group> groups;
  std::vector<Engine> engines;  // in the order of joining; those gone keep their place

  const Group& group_of(Slot trajectory) const { return groups[trajectories[trajectory].group]; }
  // Tokens that an engine must hold to go on with it.
  std::int64_t context(Slot trajectory) const {
    return group_of(trajectory).prompt_tokens + trajectories[trajectory].tokens;
  }
};

constexpr Lease make_lease(Slot slot, std::uint32_t epoch) {
  return static_cast<Lease>(slot) << 32 | epoch;
}
constexpr Slot slot_of(Lease lease) { return static_cast<Slot>(lease >> 32); }
constexpr std::uint32_t epoch_of(Lease lease) { return static_cast<std::uint32_t>(lease); }

}  // namespace kimisys::rollout
