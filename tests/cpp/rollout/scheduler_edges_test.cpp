// Edge cases, each as a small story.
#include <doctest/doctest.h>

#include <limits>

#include "expect.h"
#include "rollout/scheduler.h"
#include "rollout/scheduler_world.h"

namespace kimisys::rollout::test {
namespace {

using kimisys::test::expect_error;

bool blocked_by(const World& world, BlockerKind kind, std::int64_t since) {
  for (const Blocker& blocker : world.scheduler.blockers()) {
    if (blocker.kind == kind) return blocker.since == since;
  }
  return false;
}

TEST_CASE("an engine that dies while pausing loses no token") {
  World world(budget(10));
  world.join(0);
  world.join(1);
  world.ready();
  for (GroupId group = 1; group <= 4; ++group) world.offer(group);
  CHECK(world.leases.size() == 4);  // 0, 1, 0, 1
  world.end(world.leases[0], EndReason::kStop, 3);
  CHECK(world.tokens(world.leases[1], 7) == "pause e0 g3.0; pause e1 g2.0; pause e1 g4.0");
  CHECK(world.end(world.leases[2], EndReason::kPaused) == "");
  CHECK(world.failed(1) ==
        "requeue e1 g2.0 +7; requeue e1 g4.0 +0; hand_over g1 x1 +3 v0; batch x1 +3");
  CHECK(world.tokens(world.leases[1], 1) == "");
  CHECK(world.end(world.leases[3], EndReason::kPaused, 2) == "");
  CHECK(world.scheduler.ledger().late == 2);
  CHECK(world.ready() == "continue e0 g2.0 +7 <10; start e0 g3.0 <10; start e0 g4.0 <10; want 2");
}

TEST_CASE("an engine that leaves takes no version, whenever it is published") {
  World world(whole(1));
  world.join(0);
  world.join(1);
  world.ready();
  world.offer(1, 2);
  CHECK(world.left(0) == "pause e0 g1.0");
  CHECK(world.publish(1) == "pause e1 g1.1");
  CHECK(world.end(world.leases[0], EndReason::kPaused, 5) == "");
  CHECK(world.end(world.leases[1], EndReason::kPaused, 4) == "update e1 v1");
  CHECK(world.left(1) == "");
  CHECK(world.updated(1, 1) == "");  // late
  CHECK(world.scheduler.counts().engines == 0);
  CHECK(blocked_by(world, BlockerKind::kEngines, 0));
  CHECK(world.join(0, 4, 1) == "continue e0 g1.0 +5 <95; continue e0 g1.1 +4 <96");
}

TEST_CASE("a version that comes while an engine takes one is taken before it serves") {
  World world(whole(1));
  world.join(0);
  world.ready();
  CHECK(world.publish(1) == "update e0 v1");
  CHECK(world.publish(2) == "");
  world.offer(1);
  CHECK(world.updated(0, 1) == "update e0 v2");
  CHECK(blocked_by(world, BlockerKind::kUpdate, 0));
  CHECK(world.updated(0, 2) == "start e0 g1.0 <100");
}

TEST_CASE("an engine may take the newest at once, and joins with what it has") {
  World world(whole(1));
  CHECK(world.publish(4) == "");
  CHECK(world.join(0, 4, 3) == "update e0 v4");
  CHECK(world.join(1, 4, kNoVersion) == "update e1 v4");
  CHECK(world.publish(5) == "");
  CHECK(world.updated(0, 5) == "");
  CHECK(world.updated(1, 4) == "update e1 v5");
  CHECK(world.ready() == "want 1");
  CHECK(world.offer(1) == "start e0 g1.0 <100");
}

TEST_CASE("what the first engine serves may be published after it joined, once") {
  World world(whole(1));
  world.join(0, 4, 3);
  CHECK(world.publish(3) == "");
  expect_error(ErrorCode::kScheduler, {"version_published", "version 3 after 3", "increase"},
               [&] { world.publish(3); });
}

TEST_CASE("draining lets segments end before a version is taken") {
  Config config = whole(1);
  config.update = Update::kDrain;
  config.segment_tokens = 8;
  World world(config);
  world.join(0);
  world.ready();
  CHECK(world.offer(1) == "start e0 g1.0 <8");
  CHECK(world.publish(1) == "");
  CHECK(world.tokens(world.leases[0], 5) == "");
  CHECK(world.end(world.leases[0], EndReason::kLength, 3) == "update e0 v1");
  CHECK(world.updated(0, 1) == "continue e0 g1.0 +8 <8");
}

TEST_CASE("a group that completes while its iteration pauses is handed over with it") {
  World world(budget(10));
  world.join(0);
  world.ready();
  world.offer(1);
  world.offer(2);
  world.end(world.leases[0], EndReason::kStop, 3);
  CHECK(world.tokens(world.leases[1], 7) == "pause e0 g2.0");
  CHECK(world.end(world.leases[1], EndReason::kStop, 1) ==
        "hand_over g1 x1 +3 v0; hand_over g2 x1 +8 v0; batch x2 +11");
}

TEST_CASE("a trajectory paused before its first token starts anew") {
  World world(budget(10));
  world.join(0);
  world.ready();
  world.offer(1);
  world.offer(2);
  CHECK(world.end(world.leases[1], EndReason::kPaused) == "start e0 g2.0 <10");
  CHECK(world.end(world.leases[2], EndReason::kFailed) == "start e0 g2.0 <10");
  CHECK(world.scheduler.ledger().continued == 2);
  CHECK(world.scheduler.ledger().recomputed == 20);
}

TEST_CASE("a budget smaller than a token for each still ends with a batch") {
  World world(budget(1));
  world.join(0);
  world.ready();
  world.offer(1, 2);
  CHECK(world.offer(2, 2) ==
        "start e0 g1.0 <1; start e0 g1.1 <1; start e0 g2.0 <1; start e0 g2.1 <1; want 2");
  // Reached, but nothing is complete: what has begun goes on without that limit.
  CHECK(world.end(world.leases[0], EndReason::kLength, 1) == "continue e0 g1.0 +1 <99");
  CHECK(world.end(world.leases[1], EndReason::kLength, 1) == "continue e0 g1.1 +1 <99");
  CHECK(world.end(world.leases[4], EndReason::kStop, 1) == "");
  CHECK(world.end(world.leases[5], EndReason::kStop) == "pause e0 g2.1; pause e0 g2.0");
  world.end(world.leases[2], EndReason::kPaused);
  CHECK(world.end(world.leases[3], EndReason::kPaused) == "hand_over g1 x2 +3 v0; batch x1 +3");
}

TEST_CASE("all engines gone and come back: nothing is lost") {
  World world(whole(2));
  world.join(0);
  world.ready();
  world.offer(1);
  world.offer(2);
  world.tokens(world.leases[0], 9);
  world.now = 50;
  CHECK(world.failed(0) == "requeue e0 g1.0 +9; requeue e0 g2.0 +0");
  CHECK(blocked_by(world, BlockerKind::kEngines, 50));
  CHECK(world.publish(1) == "");
  CHECK(world.join(0, 4, 1) == "continue e0 g1.0 +9 <91; start e0 g2.0 <100");
  world.end(world.leases[2], EndReason::kLength, 91);
  CHECK(world.end(world.leases[3], EndReason::kStop, 1) ==
        "hand_over g1 x1 +100 v0; hand_over g2 x1 +1 v1; batch x2 +101");
  CHECK(world.scheduler.ledger().stale[0] == 92);
  CHECK(world.scheduler.ledger().stale[1] == 9);
}

TEST_CASE("a lease dies when it is not heard of, sooner when it was asked to pause") {
  World world(budget(10));
  world.join(0);
  world.ready();
  world.offer(1);
  world.offer(2);
  world.now = 600;
  world.tokens(world.leases[0], 1);
  CHECK(world.scheduler.next_deadline() == 1000);
  world.now = 1000;
  CHECK(world.time() == "abort e0 g2.0; requeue e0 g2.0 +0; start e0 g2.0 <9");
  CHECK(world.tokens(world.leases[1], 3) == "");  // late
  CHECK(world.scheduler.next_deadline() == 1600);
  CHECK(world.end(world.leases[2], EndReason::kStop, 9) == "pause e0 g1.0");
  world.now = 1500;
  world.tokens(world.leases[0], 1);
  CHECK(world.scheduler.next_deadline() == 2000);  // words do not put a pause off
  CHECK(blocked_by(world, BlockerKind::kPausing, 1000));
  world.now = 2000;
  CHECK(world.time() == "abort e0 g1.0; requeue e0 g1.0 +2; hand_over g2 x1 +9 v0; batch x1 +9");
}

TEST_CASE("a lease that dies with its last token is finished") {
  World world(whole(1));
  world.join(0);
  world.ready();
  world.offer(1, 1, 5);
  world.tokens(world.leases[0], 5);
  CHECK(world.failed(0) == "requeue e0 g1.0 +5; hand_over g1 x1 +5 v0; batch x1 +5");
}

TEST_CASE("live_limit bounds what has begun and not ended") {
  Config config = budget(100);
  config.live_limit = 2;
  World world(config);
  world.join(0, 8);
  world.ready();
  world.offer(1, 3);
  CHECK(world.offer(2, 3) == "start e0 g1.0 <100; start e0 g1.1 <100");
  world.tokens(world.leases[0], 5);
  CHECK(world.end(world.leases[0], EndReason::kPaused) == "continue e0 g1.0 +5 <95");
  CHECK(world.end(world.leases[1], EndReason::kStop, 5) == "start e0 g1.2 <90; want 2");
}

TEST_CASE("in overlap engines go on, and a batch waits for the trainer") {
  Config config = budget(10);
  config.deployment = Deployment::kOverlap;
  config.staleness = Staleness::kAdmission;
  config.max_staleness = 1;
  config.groups = 1;
  World world(config);
  CHECK(world.join(0) == "want 2");
  world.offer(1);
  CHECK(world.offer(2) == "start e0 g1.0 <100; start e0 g2.0 <100; want 2");
  CHECK(world.ready() == "want 2");  // before anything is complete
  CHECK(world.tokens(world.leases[0], 20) == "");
  CHECK(world.end(world.leases[0], EndReason::kStop) == "hand_over g1 x1 +20 v0; batch x1 +20");
  // The trainer has one batch of two that it may take at version 0 and 1: nothing more begins.
  world.offer(3);
  CHECK(world.offer(4) == "");
  CHECK(world.publish(1) == "pause e0 g2.0");
  CHECK(world.end(world.leases[1], EndReason::kPaused, 7) == "update e0 v1");
  CHECK(world.updated(0, 1) == "continue e0 g2.0 +7 <93; start e0 g3.0 <100");
  CHECK(world.tokens(world.leases[3], 30) == "");
  CHECK(world.ready() == "");
  CHECK(world.end(world.leases[3], EndReason::kStop) ==
        "");  // g2 has its last chance: it is waited for
  CHECK(world.end(world.leases[2], EndReason::kStop, 1) == "hand_over g2 x1 +8 v0; batch x1 +8");
}

TEST_CASE("stale groups: an iteration waits for them, or they are dropped") {
  Config config = whole(1);
  config.over_issue = 2;
  config.max_staleness = 1;
  for (const Staleness policy : {Staleness::kWait, Staleness::kDrop}) {
    config.staleness = policy;
    World world(config);
    world.join(0);
    CHECK(world.ready() == "want 2");
    world.offer(1);
    world.offer(2);
    world.tokens(world.leases[0], 1);
    CHECK(world.end(world.leases[1], EndReason::kStop, 5) == "pause e0 g1.0");
    CHECK(world.end(world.leases[0], EndReason::kPaused) == "hand_over g2 x1 +5 v0; batch x1 +5");
    world.publish(1);
    world.updated(0, 1);
    CHECK(world.ready() == "continue e0 g1.0 +1 <99; want 1");
    CHECK(world.offer(3) == "start e0 g3.0 <100");
    if (policy == Staleness::kWait) {
      CHECK(world.end(world.leases[3], EndReason::kStop, 5) == "");
      CHECK(world.end(world.leases[2], EndReason::kStop, 5) ==
            "hand_over g1 x1 +6 v0; batch x1 +6");
      continue;
    }
    CHECK(world.end(world.leases[3], EndReason::kStop, 5) == "pause e0 g1.0");
    CHECK(world.end(world.leases[2], EndReason::kPaused) == "hand_over g3 x1 +5 v1; batch x1 +5");
    CHECK(world.publish(2) == "drop g1 stale; update e0 v2");
    CHECK(world.scheduler.ledger().dropped[static_cast<std::size_t>(DropReason::kStale)].tokens ==
          1);
  }
}

TEST_CASE("over-issue recycles what was not handed over, and that goes first") {
  Config config = whole(2);
  config.over_issue = 1.5;
  World world(config);
  world.join(0);
  CHECK(world.ready() == "want 3");
  for (GroupId group = 1; group <= 3; ++group) world.offer(group);
  world.tokens(world.leases[0], 6);
  world.end(world.leases[1], EndReason::kStop, 1);
  CHECK(world.end(world.leases[2], EndReason::kStop, 1) == "pause e0 g1.0");
  CHECK(world.end(world.leases[0], EndReason::kPaused) ==
        "hand_over g2 x1 +1 v0; hand_over g3 x1 +1 v0; batch x2 +2");
  CHECK(world.ready() == "continue e0 g1.0 +6 <94; want 2");
}

TEST_CASE("a segment that fails too often in a row takes its group along") {
  Config config = whole(1);
  config.max_failures = 2;
  World world(config);
  world.join(0);
  world.ready();
  world.offer(1, 2);
  CHECK(world.end(world.leases[0], EndReason::kFailed) == "start e0 g1.0 <100");
  CHECK(world.end(world.leases[2], EndReason::kFailed, 3) == "continue e0 g1.0 +3 <97");
  CHECK(world.end(world.leases[3], EndReason::kFailed) ==
        "abort e0 g1.1; drop g1 failures; want 1");
  CHECK(world.offer(2) == "start e0 g2.0 <100");
  CHECK(world.end(world.leases[4], EndReason::kStop) == "drop g2 empty; want 1");
}

TEST_CASE("bad events are refused with the thing and the remedy, and change nothing") {
  World world(whole(2));
  world.now = 5;
  world.join(0);
  world.ready();
  world.offer(1, 1, 10);
  world.offer(2, 1, 10);
  const std::uint64_t digest = world.scheduler.digest();
  const auto bad = [&](std::initializer_list<const char*> words, const auto& action) {
    expect_error(ErrorCode::kScheduler, words, action);
    CHECK(world.scheduler.digest() == digest);
    world.scheduler.audit();
  };
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  bad({"group 3", "limit", "allow 1"}, [&] { world.offer(3, 1, 0); });
  bad({"group 3", "0 samples", "ask for 1"}, [&] { world.offer(3, 0); });
  bad({"group 3", "samples"}, [&] { world.offer(3, kHuge); });
  bad({"group 3", "prompt"}, [&] { world.offer(3, 1, 10, -1); });
  bad({"group 1", "offered before", "own id"}, [&] { world.offer(1); });
  bad({"tokens", "group 1 sample 0", "11", "limit of 10"},
      [&] { world.tokens(world.leases[0], 11); });
  bad({"tokens", "-1"}, [&] { world.tokens(world.leases[0], -1); });
  bad({"lease 999", "never given"}, [&] { world.tokens(999, 1); });
  bad({"length", "4 of 10"}, [&] { world.end(world.leases[0], EndReason::kLength, 4); });
  bad({"reason"}, [&] { world.end(world.leases[0], EndReason::kNone); });
  bad({"engine 0", "there already", "engine_failed"}, [&] { world.join(0); });
  bad({"engine 1", "version 3", "publish"}, [&] { world.join(1, 4, 3); });
  bad({"engine 7", "never joined"}, [&] { world.failed(7); });
  bad({"engine 0", "not asked"}, [&] { world.updated(0, 1); });
  bad({"version_published", "-4"}, [&] { world.publish(-4); });
  bad({"trainer_ready", "since 5"}, [&] { world.ready(); });
  bad({"kind 99"}, [&] { world.send(event(static_cast<EventKind>(99))); });
  world.now = 4;
  bad({"time", "does not go back"}, [&] { world.time(); });
}

TEST_CASE("several events at once: those before a bad one are taken") {
  Scheduler scheduler(whole(1));
  std::vector<Event> events = {event(EventKind::kTrainerReady), event(EventKind::kTime),
                               event(EventKind::kTrainerReady), event(EventKind::kTime)};
  std::vector<Action> actions;
  std::size_t taken = 9;
  CHECK_THROWS(scheduler.handle(events, actions, taken));
  CHECK(taken == 2);
  CHECK(actions.size() == 1);
}

TEST_CASE("configurations that contradict themselves are refused by name") {
  const auto bad = [](std::initializer_list<const char*> words, const auto& change) {
    Config config = whole(2);
    change(config);
    expect_error(ErrorCode::kScheduler, words, [&] { Scheduler{config}; });
  };
  bad({"token_budget", "groups"}, [](Config& c) { c.groups = 0; });
  bad({"groups is -1"}, [](Config& c) { c.groups = -1; });
  bad({"over_issue is 0.5"}, [](Config& c) { c.over_issue = 0.5; });
  bad({"over_issue"}, [](Config& c) { c.over_issue = std::numeric_limits<double>::quiet_NaN(); });
  bad({"over_issue", "token_budget"}, [](Config& c) {
    c.over_issue = 2;
    c.token_budget = 5;
  });
  bad({"staleness", "max_staleness"}, [](Config& c) { c.staleness = Staleness::kDrop; });
  bad({"admission", "groups"}, [](Config& c) {
    c.staleness = Staleness::kAdmission;
    c.max_staleness = 1;
    c.groups = 0;
    c.token_budget = 5;
  });
  bad({"overlap", "max_staleness 0"}, [](Config& c) {
    c.deployment = Deployment::kOverlap;
    c.max_staleness = 0;
  });
  bad({"over_issue", "max_staleness 0"}, [](Config& c) {
    c.over_issue = 2;
    c.max_staleness = 0;
  });
  bad({"lease_timeout is 0"}, [](Config& c) { c.lease_timeout = 0; });
  bad({"max_failures is 0"}, [](Config& c) { c.max_failures = 0; });
  bad({"placement is 9"}, [](Config& c) { c.placement = static_cast<Placement>(9); });
  bad({"kv_headroom"}, [](Config& c) { c.kv_headroom = 0; });
  bad({"kv_cost"}, [](Config& c) { c.kv_cost = -1; });
}

}  // namespace
}  // namespace kimisys::rollout::test
