#include "reshard/route.h"

#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <random>
#include <set>

#include "expect.h"
#include "reshard/demand.h"
#include "reshard/sample.h"
#include "reshard/simulate.h"

namespace kimisys::reshard {
namespace {

std::vector<Place> on_own_nodes(std::int64_t ranks, std::int64_t first) {
  std::vector<Place> places;
  for (std::int64_t r = 0; r < ranks; ++r) places.push_back({r, first + r, 0, 0});
  return places;
}

std::vector<std::int64_t> some(std::mt19937& random, std::int64_t ranks) {
  std::set<std::int64_t> chosen;
  for (int i = 0; i < 3; ++i) chosen.insert(static_cast<std::int64_t>(random() % ranks));
  return {chosen.begin(), chosen.end()};
}

}  // namespace

TEST_CASE("demands sum what the same ranks hold and want") {
  const auto demands = demands_of(test::sharded("w", DType::kFloat32, {8, 8}, 0, 4),
                                  test::sharded("w", DType::kBFloat16, {8, 8}, 1, 2));
  REQUIRE(demands.size() == 8);
  CHECK(demands[3] == Demand{{1}, {1}, {{0, 16}}, 1});
  const auto merged = merge_demands({{{0}, {1}, {{3, 5}}, 1}, {{0}, {1}, {{2, 7}}, 2}});
  REQUIRE(merged.size() == 1);
  CHECK(merged[0] == Demand{{0}, {1}, {{2, 7}, {3, 5}}, 3});
}

TEST_CASE("sets of ranks have one number each") {
  RankSets sets;
  CHECK(sets.number({}) == 0);
  const auto set = sets.number({1, 5, 9});
  CHECK(sets.number({1, 5}) != set);
  CHECK(sets.number({1, 5, 9}) == set);
  CHECK(sets.add(set, 9) == set);
  CHECK(sets.ranks(set) == std::vector<std::int64_t>{1, 5, 9});
}

TEST_CASE("routes of random demands are simulated to their end") {
  for (unsigned seed = 0; seed < 30; ++seed) {
    std::mt19937 random(seed);
    std::vector<Demand> demands;
    for (int i = 0; i < 40; ++i) {
      demands.push_back({some(random, 20), some(random, 20), {{0, 8}, {1, 1 + i % 3}}, 1});
    }
    const auto cluster =
        std::make_shared<const Cluster>(on_own_nodes(20, 0), on_own_nodes(20, seed % 2 ? 10 : 20));
    const Route route(cluster, demands, {1.0, 0.0, 8, seed % 3 != 0});
    for (const Order order : {Order::kPlanned, Order::kNatural}) {
      const Simulation simulation = simulate(route, order);
      std::int64_t bytes = 0;
      for (const Message& message : simulation.messages) bytes += message.bytes;
      CHECK(bytes == route.remote_bytes());
      for (std::size_t n = 0; n < cluster->nics().size(); ++n) {
        CHECK(simulation.send_seconds[n] == doctest::Approx(double(route.egress()[n])));
        CHECK(simulation.receive_seconds[n] == doctest::Approx(double(route.ingress()[n])));
      }
    }
  }
}

TEST_CASE("what a route refuses") {
  const auto bad = [](std::initializer_list<const char*> words, const Demand& demand,
                      const RouteOptions& options) {
    kimisys::test::expect_error(ErrorCode::kPlan, words, [&] {
      Route(std::make_shared<const Cluster>(on_own_nodes(2, 0), on_own_nodes(2, 2)), {demand},
            options);
    });
  };
  const Demand fine{{0}, {1}, {{0, 8}}, 1};
  bad({"0 owners"}, {{}, {1}, {{0, 8}}, 1}, {});
  bad({"destination rank 7"}, {{0}, {7}, {{0, 8}}, 1}, {});
  bad({"at most"}, {{0}, {1}, {{0, std::numeric_limits<std::int64_t>::max()}}, 1}, {});
  bad({"largest message", "-3"}, fine, {1.0, 0.0, -3, true});
  bad({"parts of at most 1 bytes", "hops", "[0, 1]", "larger chunk"},
      {{0}, {0, 1}, {{0, std::int64_t{1} << 31U}}, 1}, {1.0, 0.0, 1, true});
  constexpr auto kLargest = std::numeric_limits<std::int64_t>::max();
  const auto cluster = std::make_shared<const Cluster>(on_own_nodes(2, 0), on_own_nodes(2, 2));
  CHECK(Route(cluster, {fine}, {1.0, 0.0, kLargest, true}).parts().size() == 1);
  const std::vector<Demand> many(4097, Demand{{0}, {1}, {{0, kMaxBytes}}, 1});
  kimisys::test::expect_error(ErrorCode::kPlan, {"receivers [1]", "bytes in all"},
                              [&] { Route(cluster, many, {1.0, 0.0, kLargest, true}); });
}

}  // namespace kimisys::reshard
