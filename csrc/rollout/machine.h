// The scheduler's inside: the tables of state.h, what is derived from them, and one function per
// thing that can happen. Private to csrc/rollout; callers use scheduler.h.
//
// An event is checked first and changes nothing if it is bad (machine_events.cpp). Its own
// consequences follow (leases, groups, engines), and then settle() does what has become possible:
// close the iteration, admit groups, start trajectories, ask for prompts.
#pragma once

#include <compare>
#include <cstdint>
#include <deque>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "rollout/config.h"
#include "rollout/deadlines.h"
#include "rollout/ledger.h"
#include "rollout/predict.h"
#include "rollout/queue.h"
#include "rollout/scheduler.h"
#include "rollout/state.h"
#include "rollout/types.h"

namespace kimisys::rollout {

// A group with tokens, in the order in which it grows too stale.
struct Aging {
  std::int64_t first_version = kNoVersion;
  std::uint64_t number = 0;
  Slot slot = kNoSlot;
  friend auto operator<=>(const Aging&, const Aging&) = default;
};

// Output tokens of a trajectory under one version.
struct Made {
  std::int64_t version = kNoVersion;
  std::int64_t tokens = 0;
};

struct Machine {
  explicit Machine(const Config& config);

  void handle(const Event& event, std::vector<Action>& out);
  std::vector<Blocker> blockers() const;
  Counts counts() const;
  void audit() const;

  // Events: machine_events.cpp. False: of a dead lease or a lost engine, nothing happened.
  bool offered(const Event& event);
  bool tokens(const Event& event);
  bool segment_ended(const Event& event);
  bool time_passed();
  bool trainer_ready();
  bool take(const Event& event);
  Slot live(const Event& event) const;  // the trajectory of its lease; kNoSlot: the lease is dead
  void check_tokens(const Event& event, Slot slot) const;

  // Engines: machine_engines.cpp.
  bool joined(const Event& event);
  bool left(const Event& event);
  bool failed(const Event& event);
  bool updated(const Event& event);
  bool reported(const Event& event);
  bool published(const Event& event);
  Engine& known(const Event& event);
  void follow();              // engines behind the newest version are to take it
  void ask(Engine& engine);   // if it is idle and to take a version
  void idle(Engine& engine);  // its last lease ended
  void pause_all(const Engine& engine);

  // Leases: machine_leases.cpp.
  void lease(Slot slot, std::uint32_t place);
  void pause(Slot slot);
  void arrive(Slot slot, std::int64_t tokens);
  void release(
      Slot slot);        // the lease is dead; the trajectory is in no phase until the caller says
  void wait(Slot slot);  // or finishes it, if nothing is left to make
  void requeue(Slot slot);
  void abort(Slot slot);
  void finish(Slot slot, EndReason reason);
  Action& act(ActionKind kind);
  Action& act(ActionKind kind, Slot slot);

  // Groups: machine_groups.cpp.
  void admit();
  void complete(Slot group);
  void drop(Slot group, DropReason reason);
  void hand_over(Slot group);
  void remove(Slot group);
  void grow_old(Slot slot, std::int64_t version);  // a lease's first token
  bool drop_if_stale(Slot group);
  void drop_stale();
  std::int64_t tokens_of(const Group& group) const;
  Slot free_trajectory();

  // The iteration: machine_iteration.cpp.
  void settle();
  bool open() const;  // trajectories may be leased
  bool reached() const;
  bool waits_for_stale() const;
  void close();
  void hand_over_batch();
  bool admit_next();
  bool may_begin() const;
  std::int64_t admitted_most() const;
  void start();
  void want();

  State state;
  Ledger ledger;
  Predictor predictor;
  Queue queue;
  Deadlines deadlines;

  std::unordered_map<GroupId, Slot> groups_by_id;
  std::unordered_map<EngineId, std::uint32_t> engines_by_id;
  std::vector<Slot> free_trajectories;
  std::vector<Slot> free_groups;
  std::vector<std::vector<Made>> made;  // by trajectory's slot

  std::deque<Slot> unadmitted;                               // groups as offered
  std::set<Aging> unfinished;                                // groups with tokens
  std::set<Aging> finished;                                  // complete groups
  std::set<std::pair<std::uint64_t, Slot>> complete_groups;  // number, slot
  std::uint64_t next_number = 0;

  std::int64_t groups = 0;
  std::int64_t admitted = 0;  // groups, complete ones included
  std::int64_t trajectories = 0;
  std::int64_t waiting = 0;
  std::int64_t running = 0;  // leases
  std::int64_t active = 0;   // engines that serve or update

  bool ready = false;    // the trainer waits for a batch
  bool closing = false;  // it is reached: all leases were asked to pause
  bool trains = false;   // the trainer has a batch whose version is not published yet
  bool first_published = false;
  std::int64_t turn = 0;  // microseconds: the last kTrainerReady or kBatch
  std::int64_t iteration = 0;
  std::int64_t spent = 0;   // output tokens since the last batch
  std::int64_t wanted = 0;  // prompts asked for and not offered yet
  std::int64_t wanted_since = 0;
  bool unsettled = false;  // offers wait for those that are still to come
  std::uint64_t digest = 0;

  std::vector<Action>* out = nullptr;  // of the event that is handled
};

}  // namespace kimisys::rollout
