// Random worlds over all compositions of policies: the model's promises hold after every event.
#include <doctest/doctest.h>

#include <exception>
#include <sstream>

#include "rollout/scheduler.h"
#include "rollout/scheduler_toys.h"
#include "rollout/scheduler_world.h"

namespace kimisys::rollout::test {
namespace {

// The last events and actions, to look into a failure with.
std::string history(const Toys& toys) {
  std::ostringstream stream;
  stream << toys.scheduler().config() << '\n';
  const auto& events = toys.events();
  for (std::size_t i = events.size() > 12 ? events.size() - 12 : 0; i < events.size(); ++i) {
    stream << "  " << events[i].time << ' ' << name(events[i].kind) << " e"
           << static_cast<std::int32_t>(events[i].engine) << " id " << events[i].id << " tokens "
           << events[i].tokens << " version " << events[i].version << ' ' << name(events[i].reason)
           << '\n';
  }
  const auto& actions = toys.actions();
  for (std::size_t i = actions.size() > 12 ? actions.size() - 12 : 0; i < actions.size(); ++i) {
    stream << "    " << text(actions[i]) << '\n';
  }
  return stream.str();
}

struct Seen {
  std::int64_t batches = 0;
  std::int64_t overshoots = 0;
  std::int64_t late = 0;
  std::int64_t requeued = 0;
  std::int64_t refused = 0;
  std::array<std::int64_t, 4> dropped = {};
};

// Runs one world to its end, and its events once more.
void run(std::uint64_t seed, int steps, int illegal, Seen& seen) {
  std::mt19937_64 random(seed);
  Toys toys(random_config(random), seed);
  try {
    for (int i = 0; i < steps; ++i) toys.step(illegal);
    const bool finished = toys.finish(20000);
    INFO("seed " << seed << ' ' << history(toys));
    CHECK(finished);
  } catch (const std::exception& error) {
    FAIL("seed " << seed << ": " << std::string(error.what()) << '\n' << history(toys));
  }
  Scheduler again(toys.scheduler().config());
  std::vector<Action> actions;
  std::size_t taken = 0;
  again.handle(toys.events(), actions, taken);
  REQUIRE(taken == toys.events().size());
  REQUIRE(actions.size() == toys.actions().size());
  CHECK(again.digest() == toys.scheduler().digest());

  const Ledger& ledger = toys.scheduler().ledger();
  seen.batches += toys.scheduler().counts().iteration;
  seen.overshoots += toys.model().overshoots();
  seen.late += ledger.late;
  seen.requeued += ledger.requeued;
  seen.refused += toys.refused();
  for (std::size_t i = 0; i < 4; ++i) seen.dropped.at(i) += ledger.dropped.at(i).trajectories;
}

TEST_CASE("random worlds keep every promise, and the same events make the same actions") {
  Seen seen;
  for (std::uint64_t seed = 1; seed <= 1500; ++seed) run(seed, 150, 0, seen);
  // The worlds are rough enough to mean something.
  CHECK(seen.batches > 5000);
  CHECK(seen.overshoots > 100);
  CHECK(seen.late > 1000);
  CHECK(seen.requeued > 1000);
  CHECK(seen.dropped[static_cast<std::size_t>(DropReason::kStale)] > 500);
  CHECK(seen.dropped[static_cast<std::size_t>(DropReason::kFailures)] > 500);
  CHECK(seen.dropped[static_cast<std::size_t>(DropReason::kEmpty)] > 100);
}

TEST_CASE("events that nobody may send change nothing") {
  Seen seen;
  for (std::uint64_t seed = 10'001; seed <= 10'500; ++seed) run(seed, 150, 50, seen);
  CHECK(seen.refused > 3000);
}

}  // namespace
}  // namespace kimisys::rollout::test
