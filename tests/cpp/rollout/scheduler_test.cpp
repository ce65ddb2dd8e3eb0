// Iterations from end to end: what is started, paused, handed over, and in which order.
#include "rollout/scheduler.h"

#include <doctest/doctest.h>

#include "rollout/scheduler_world.h"

namespace kimisys::rollout::test {
namespace {

TEST_CASE("a whole iteration hands over its groups in the order of the offers") {
  World world(whole(2));
  CHECK(world.join(0) == "");
  CHECK(world.ready() == "want 2");
  CHECK(world.offer(7, 2) == "");
  CHECK(world.offer(8) == "start e0 g7.0 <100; start e0 g7.1 <100; start e0 g8.0 <100");
  CHECK(world.offer(9) == "");
  CHECK(world.tokens(world.leases[0], 5) == "");
  CHECK(world.end(world.leases[2], EndReason::kStop, 3) == "");
  CHECK(world.end(world.leases[0], EndReason::kStop, 0) == "");
  CHECK(world.end(world.leases[1], EndReason::kRepetition, 9) ==
        "hand_over g7 x2 +14 v0; hand_over g8 x1 +3 v0; batch x2 +17");
  CHECK(world.ready() == "start e0 g9.0 <100; want 1");
}

TEST_CASE("a budget ends an iteration, and the unfinished go first in the next") {
  World world(budget(20));
  CHECK(world.join(0, 3) == "");
  CHECK(world.ready() == "want 2");
  CHECK(world.offer(1) == "");
  CHECK(world.offer(2) == "start e0 g1.0 <20; start e0 g2.0 <20; want 2");
  CHECK(world.offer(3) == "");
  CHECK(world.offer(4) == "start e0 g3.0 <20; want 2");
  CHECK(world.tokens(world.leases[1], 8) == "");
  CHECK(world.end(world.leases[0], EndReason::kStop, 4) == "start e0 g4.0 <8");
  CHECK(world.tokens(world.leases[2], 8) == "pause e0 g3.0; pause e0 g2.0; pause e0 g4.0");
  CHECK(world.end(world.leases[1], EndReason::kPaused, 1) == "");
  CHECK(world.end(world.leases[3], EndReason::kPaused) == "");
  CHECK(world.end(world.leases[2], EndReason::kPaused) == "hand_over g1 x1 +4 v0; batch x1 +4");
  CHECK(world.publish(1) == "update e0 v1");
  CHECK(world.ready() == "want 2");
  CHECK(world.updated(0, 1) ==
        "continue e0 g2.0 +9 <20; continue e0 g3.0 +8 <20; start e0 g4.0 <20");
}

}  // namespace
}  // namespace kimisys::rollout::test
