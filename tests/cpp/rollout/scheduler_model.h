// A naive model of what a scheduler promises, for tests: it watches events and actions and computes
// by itself, with loops over everything, what must and what must not have happened.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "rollout/scheduler.h"

namespace kimisys::rollout::test {

struct ModelSample {
  std::int64_t tokens = 0;
  std::int64_t failures = 0;
  std::int64_t first_version = kNoVersion;
  std::optional<Lease> lease;
  bool finished = false;
};

struct ModelGroup {
  std::uint64_t number = 0;
  std::int64_t limit = 0;
  std::vector<ModelSample> samples;
  bool begun = false;

  bool complete() const;
  std::int64_t tokens() const;
  std::int64_t first_version() const;
};

struct ModelLease {
  GroupId group = 0;
  std::uint32_t sample = 0;
  EngineId engine = kNoEngine;
  std::int64_t made = 0;
  std::int64_t limit = 0;
  std::int64_t heard = 0;
  std::optional<std::int64_t> asked_to_pause;
};

struct ModelEngine {
  bool there = false;
  bool leaving = false;
  std::int64_t version = kNoVersion;
  std::optional<std::int64_t> asked;
  std::int64_t sequences = 0;  // most
};

// Throws std::runtime_error naming the promise that is broken.
class Model {
 public:
  explicit Model(const Config& config) : config_(config) {}

  void observe(const Event& event, std::span<const Action> actions, const Scheduler& scheduler);

  // What a world of engines may look at.
  const std::map<GroupId, ModelGroup>& groups() const { return groups_; }
  const std::map<Lease, ModelLease>& leases() const { return leases_; }
  const std::map<EngineId, ModelEngine>& engines() const { return engines_; }
  bool ready() const { return ready_; }
  std::int64_t newest() const { return newest_; }
  std::int64_t debt() const { return debt_; }
  std::int64_t overshoots() const { return overshoots_; }

 private:
  void apply(const Event& event);
  void apply_engine(const Event& event);
  void apply_lease(const Event& event);
  void arrive(ModelLease& lease, std::int64_t tokens);
  void unlease(Lease lease);
  void expect_drops();
  void act(const Action& action);
  void started(const Action& action);
  void ended(const Action& action);
  void handed_over(const Action& action);
  void batch(const Action& action);
  void dropped(const Action& action);
  void after(const Scheduler& scheduler);
  void check_counts(const Counts& counts) const;
  void check_bound();
  void check_idle() const;
  bool reached() const;
  bool waits() const;
  bool done() const { return ready_ && reached() && !waits(); }
  std::int64_t complete() const;
  std::int64_t deadline(const ModelLease& lease) const;
  bool has_leases(EngineId engine) const;
  ModelSample& sample(GroupId group, std::uint32_t sample);

  Config config_;
  std::map<GroupId, ModelGroup> groups_;
  std::map<Lease, ModelLease> leases_;  // live ones
  std::set<Lease> given_;               // all, ever
  std::map<EngineId, ModelEngine> engines_;
  std::int64_t now_ = 0;
  std::int64_t newest_ = kNoVersion;
  std::uint64_t offered_ = 0;
  bool ready_ = false;
  std::int64_t spent_ = 0;
  std::int64_t batches_ = 0;
  std::int64_t debt_ = 0;
  std::int64_t overshoots_ = 0;

  // Of the event that is watched.
  std::map<Lease, ModelLease> expired_;
  std::map<Lease, ModelLease> lost_;  // must be requeued
  std::map<GroupId, std::set<DropReason>> drops_;
  std::set<GroupId> failed_;  // groups with a segment that failed once too often
  std::vector<std::uint64_t> handed_;
  std::int64_t handed_tokens_ = 0;
  std::int64_t started_now_ = 0;
  bool late_ = false;
  bool offers_wait_ = false;  // for others of the same kWant

  // While an iteration is reached and its leases pause: the most that it can have made at its end.
  std::optional<std::int64_t> bound_;
};

}  // namespace kimisys::rollout::test
