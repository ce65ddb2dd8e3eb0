// The rollout scheduler: a deterministic state machine. Events go in, actions come out; no clock,
// no thread, no I/O. The same events in the same order make the same actions, in production, in the
// simulator and in a replay.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "rollout/config.h"
#include "rollout/ledger.h"
#include "rollout/types.h"

namespace kimisys::rollout {

// What an iteration waits for, and since when.
enum class BlockerKind : std::uint32_t {
  kTrainer,  // no kTrainerReady since the last batch
  kEngines,  // no engine serves
  kPrompts,  // engines have room and nothing waits
  kUpdate,   // an engine takes a version
  kPausing,  // a lease was asked to pause
  kRunning,  // a lease runs; of several, the one that has been heard of least recently
  kWaiting,  // a trajectory waits for room
};

struct Blocker {
  BlockerKind kind = BlockerKind::kTrainer;
  std::int64_t since = 0;  // microseconds
  EngineId engine = kNoEngine;
  Lease lease = kNoLease;
  GroupId group = 0;
  std::uint32_t sample = 0;
  std::int64_t tokens = 0;
};

struct Counts {
  std::int64_t groups = 0;        // offered, not yet handed over or dropped
  std::int64_t complete = 0;      // of those, complete
  std::int64_t trajectories = 0;  // of those groups
  std::int64_t waiting = 0;
  std::int64_t running = 0;  // leased, pausing included
  std::int64_t engines = 0;  // that serve or update
  std::int64_t iteration = 0;
  std::int64_t spent = 0;  // output tokens of this iteration
};

struct Machine;

class Scheduler {
 public:
  explicit Scheduler(const Config& config);  // raises SchedulerError, see check()
  ~Scheduler();
  Scheduler(Scheduler&&) noexcept;
  Scheduler& operator=(Scheduler&&) noexcept;

  // Appends to `actions` what is to be done. Raises SchedulerError, before anything changed, for an
  // event that no correct caller sends: a time that goes back, a group offered twice, an engine
  // that is not there, more tokens than a lease's limit, a version that does not increase. What a
  // dead lease sends is ignored, and counted.
  void handle(const Event& event, std::vector<Action>& actions);

  // The same for several, in order. Where one raises, those before it were taken; `taken` says how
  // many.
  void handle(std::span<const Event> events, std::vector<Action>& actions, std::size_t& taken);

  // When kTime is due at the latest, in microseconds; kNever: nothing is pending. O(1) amortised.
  // Now, where a kWant was answered in part: what came starts at the next event that is no offer.
  std::int64_t next_deadline() const;

  // What keeps the batch from being complete, worst first; empty when nothing is asked for.
  std::vector<Blocker> blockers() const;

  Counts counts() const;
  const Ledger& ledger() const;
  const Config& config() const;

  // A 64-bit chain over all events and actions so far: equal exactly where they are.
  std::uint64_t digest() const;

  // For simulations alone, before the first event: true output lengths, where the policies would
  // ask for a prediction. Not in the digest.
  void reveal(std::function<std::int64_t(GroupId group, std::uint32_t sample)> truth);

  // Checks every invariant from scratch and raises SchedulerError naming the one that is broken.
  // For tests: O(everything).
  void audit() const;

 private:
  std::unique_ptr<Machine> machine_;
};

}  // namespace kimisys::rollout
