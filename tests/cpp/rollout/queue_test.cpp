#include "rollout/queue.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "policy_world.h"

using namespace kimisys::rollout;

namespace {

std::vector<Slot> drain(Queue& queue) {
  std::vector<Slot> order;
  while (queue.size() > 0) {
    order.push_back(queue.front());
    queue.erase(order.back());
  }
  CHECK(queue.front() == kNoSlot);
  CHECK(queue.begun() == 0);
  return order;
}

Predictor correlated(PolicyWorld& world) {
  Draw draw(11);
  Predictor predictor;
  for (int g = 0; g < 100; ++g) {
    const Slot group = world.group(4);
    const std::int64_t base = 200 + draw.below(8000);
    for (std::uint32_t s = 0; s < 4; ++s) {
      world.finish(world.sample(group, s), base + draw.below(100));
      predictor.finished(world.state, world.sample(group, s));
    }
  }
  return predictor;
}

}  // namespace

TEST_CASE("queue: every order is a sort, after random pushes, erasures and siblings' ends") {
  for (int round = 0; round < 6; ++round) {
    const std::array orders = {Order::kFifo, Order::kLongestFirst, Order::kProbeFirst};
    const Order order = orders[static_cast<std::size_t>(round % 3)];
    PolicyWorld world;
    world.state.config.order = order;
    world.state.config.token_budget = round < 3 ? 0 : 100000;
    const bool potential = round < 3 && order == Order::kProbeFirst;
    CHECK(by_potential(world.state.config) == potential);
    const Predictor predictor = correlated(world);
    Draw draw(12);
    Queue queue;
    std::vector<Slot> inside;
    for (int g = 0; g < 50; ++g) {
      const Slot group = world.group(4);
      world.state.groups[group].round = potential ? 0 : g / 20;
      for (const Slot slot : world.state.groups[group].trajectories) {
        if (draw.below(3) == 0) world.state.trajectories[slot].tokens = draw.below(5000);
      }
      for (const Slot slot : world.state.groups[group].trajectories) {
        queue.push(world.state, predictor, slot);
        queue.push(world.state, predictor, slot);  // is in already
        inside.push_back(slot);
      }
      if (draw.below(2) == 0) {
        const auto gone =
            static_cast<std::size_t>(draw.below(static_cast<std::int64_t>(inside.size())));
        queue.erase(inside[gone]);
        if (draw.below(2) == 0) {
          world.finish(inside[gone], 1 + draw.below(20000));
          queue.reorder(world.state, predictor, world.state.trajectories[inside[gone]].group);
        }
        inside.erase(inside.begin() + static_cast<std::ptrdiff_t>(gone));
      }
    }
    CHECK(queue.size() == inside.size());
    const auto begun = [&](Slot slot) { return world.state.trajectories[slot].tokens > 0; };
    CHECK(queue.begun() ==
          static_cast<std::size_t>(std::count_if(inside.begin(), inside.end(), begun)));
    const auto key = [&](Slot slot) {
      const Trajectory& trajectory = world.state.trajectories[slot];
      const bool probe =
          order == Order::kProbeFirst && trajectory.sample == 0 && trajectory.tokens == 0;
      const bool ranked = order != Order::kFifo && !probe;
      const double rest =
          potential ? predictor.potential(world.state, slot) : predictor.rest(world.state, slot);
      const Group& group = world.state.group_of(slot);
      // What has begun, then what an earlier iteration admitted; or the potential alone.
      const bool first = begun(slot) && !potential;
      return std::make_tuple(first ? -1 : group.round, probe ? 0 : 1, ranked ? -rest : 0.0,
                             group.number, trajectory.sample);
    };
    std::sort(inside.begin(), inside.end(),
              [&](Slot left, Slot right) { return key(left) < key(right); });
    CHECK(drain(queue) == inside);
  }
}

TEST_CASE("queue: probes first; a probe's end sends its siblings to where they belong") {
  PolicyWorld world;
  const Predictor predictor = correlated(world);
  Queue queue;
  std::vector<Slot> groups;
  for (int g = 0; g < 3; ++g) {
    groups.push_back(world.group(2));
    for (const Slot slot : world.state.groups[groups.back()].trajectories) {
      queue.push(world.state, predictor, slot);
    }
  }
  for (const Slot group : groups) {
    const Slot probe = world.sample(group, 0);
    CHECK(queue.front() == probe);
    queue.erase(probe);
  }
  world.finish(world.sample(groups[0], 0), 300);
  world.finish(world.sample(groups[1], 0), 2000);
  world.finish(world.sample(groups[2], 0), 8000);
  for (const Slot group : groups) queue.reorder(world.state, predictor, group);
  CHECK(drain(queue) == std::vector<Slot>{world.sample(groups[2], 1), world.sample(groups[1], 1),
                                          world.sample(groups[0], 1)});
}

TEST_CASE("queue: an erasure of what is not in does nothing") {
  PolicyWorld world;
  Queue queue;
  const Slot slot = world.sample(world.group(1), 0);
  queue.erase(slot);
  queue.push(world.state, Predictor(), slot);
  queue.erase(slot);
  queue.erase(slot);
  CHECK(queue.size() == 0);
}

TEST_CASE("queue: when the predictor has learned, what was put in before is ordered anew") {
  PolicyWorld world;
  world.state.config.order = Order::kLongestFirst;
  Predictor predictor;
  Queue queue;
  const Slot early = world.sample(world.group(1), 0);
  queue.push(world.state, predictor, early);
  Draw draw(13);
  Slot group = kNoSlot;
  for (int g = 0; g < 50; ++g) {
    group = world.group(4);
    const std::int64_t length = 5000 + draw.below(3000);
    for (std::uint32_t s = 0; s < 3; ++s) {
      world.finish(world.sample(group, s), length);
      predictor.finished(world.state, world.sample(group, s));
    }
  }
  world.state.trajectories[world.sample(group, 3)].limit = 4000;
  queue.push(world.state, predictor, world.sample(group, 3));
  CHECK(queue.front() == world.sample(group, 3));  // 4,000 against what was a guess
  queue.reorder(world.state, predictor, group);
  CHECK(queue.front() == early);
}
