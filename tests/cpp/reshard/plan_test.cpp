#include "reshard/plan.h"

#include <doctest/doctest.h>

#include <functional>

#include "expect.h"
#include "reshard/sample.h"

namespace kimisys::reshard {
namespace {

using test::sharded;
using test::share;

void bad(std::initializer_list<const char*> words, const std::function<void()>& action) {
  kimisys::test::expect_error(ErrorCode::kPlan, words, action);
}

Plan plan(const Layout& source, const Layout& destination) {
  return make_plan(share(source), share(destination));
}

}  // namespace

TEST_CASE("rows to columns: one copy for each pair") {
  const Plan it = plan(sharded("w", DType::kFloat32, {8, 8}, 0, 4),
                       sharded("w", DType::kBFloat16, {8, 8}, 1, 2));
  CHECK(it.steps().size() == 8);
  CHECK(it.proof() == Proof{128, 128, 0, 8});
  CHECK(it.nbytes() == 128);
  const Copy copy = it.copy(0);
  CHECK(copy.source_dtype == DType::kFloat32);
  CHECK(copy.destination_dtype == DType::kBFloat16);
  CHECK(copy.destination_strides == Dims{8, 2});
  const Plan second = it.of_rank(1);
  CHECK(second.steps().size() == 4);
  CHECK(second.destination().buffers().size() == 1);
  CHECK(second.proof().copied_bytes == 64);
  bad({"rank 2", "[0, 1]"}, [&] { it.of_rank(2); });
}

TEST_CASE("shares: what each source rank writes, padding by the lowest") {
  const Layout source = sharded("w", DType::kFloat32, {8, 8}, 0, 2);
  const Layout destination({{"w", DType::kFloat32, {8, 8}}}, {{0, "x", 260}},
                           {{"w", {{0, 0}, {8, 8}}, 0, "x", 0, {32, 4}}}, {{0, "x", 256, 4}});
  const Plan it = plan(source, destination);
  CHECK(it.of_source(0).proof() == Proof{132, 128, 4, 1});
  CHECK(it.of_source(1).proof() == Proof{128, 128, 0, 1});
  CHECK(it.of_source(1).of_rank(0).proof() == Proof{128, 128, 0, 1});
  CHECK(it.of_source(0).fills_padding());
  CHECK_FALSE(it.of_source(1).fills_padding());
  bad({"no source rank 2", "[0, 1]"}, [&] { it.of_source(2); });
  bad({"already the share of source rank 0"}, [&] { it.of_source(0).of_source(1); });
  bad({"share of source rank 1 reads from source rank 0"},
      [&] { prove(source, destination, it.of_source(0).steps(), 1); });
  const Step own = it.of_source(1).steps()[0];
  bad({"'w'", "more than once"}, [&] { prove(source, destination, {own, own}, 1); });
}

TEST_CASE("a share: what it leaves to others may be missing, what it writes may not meet") {
  const Layout source = sharded("w", DType::kInt8, {8}, 0, 2);
  const auto into = [](std::int64_t second, std::vector<Padding> padding) {
    return Layout({{"w", DType::kInt8, {8}}}, {{0, "x", 12}},
                  {{"w", {{0}, {2}}, 0, "x", 0, {1}}, {"w", {{2}, {2}}, 0, "x", second, {1}}},
                  std::move(padding));
  };
  const std::vector<Step> both = {{0, 0, {{0}, {2}}}, {0, 1, {{2}, {2}}}};
  CHECK(prove(source, into(9, {}), both, 0) == Proof{4, 4, 0, 2});
  CHECK(prove(source, into(1, {}), {both[0]}, 0) == Proof{2, 2, 0, 1});
  bad({"bytes [1:2) of buffer 'x' on destination rank 0", "twice", "[0:2]", "[2:4]"},
      [&] { prove(source, into(1, {}), both, 0); });
  const Layout padded = into(9, {{0, "x", 1, 3}});
  bad({"bytes [1:2)", "twice", "padding"}, [&] { prove(source, padded, both, 0); });
  CHECK(prove(source, padded, {}, 1) == Proof{0, 0, 0, 0});
  bad({"source rank 2, which the source does not have; its ranks are [0, 1]"},
      [&] { prove(source, padded, {}, 2); });
  bad({"share of source rank 0", "does not have"}, [&] { prove({}, padded, {}, 0); });
}

TEST_CASE("replicas: same device first, then same node, then the rank with fewest bytes") {
  const auto holder = [](std::vector<Place> places, std::int64_t ranks) {
    std::vector<Buffer> buffers;
    std::vector<Fragment> fragments;
    for (std::int64_t rank = 0; rank < ranks; ++rank) {
      buffers.push_back({rank, "x", 4});
      fragments.push_back({"w", {{0}, {4}}, rank, "x", 0, {1}});
    }
    return Layout({{"w", DType::kInt8, {4}}}, buffers, fragments, {}, std::move(places));
  };
  const Layout source = holder({{0, 1, 0}, {1, 0, 1}, {2, 0, 0}}, 3);
  CHECK(plan(source, holder({{0, 0, 0}}, 1)).copy(0).source_rank == 2);
  CHECK(plan(source, holder({{0, 0, 1}}, 1)).copy(0).source_rank == 1);
  CHECK(plan(source, holder({{0, 1, 7}}, 1)).copy(0).source_rank == 0);
  CHECK(plan(source, holder({{0, 5, 0}}, 1)).copy(0).source_rank == 0);
  std::vector<std::int64_t> served(3);
  const Plan balanced = plan(holder({{0, 0, 0}, {1, 0, 1}, {2, 0, 2}}, 3),
                             holder({{0, 9}, {1, 9}, {2, 9}, {3, 9}, {4, 9}, {5, 9}}, 6));
  for (std::size_t i = 0; i < balanced.steps().size(); ++i) {
    ++served[static_cast<std::size_t>(balanced.copy(i).source_rank)];
  }
  CHECK(served == std::vector<std::int64_t>{2, 2, 2});
}

TEST_CASE("overlapping sources: the remainder is filled from the next, nothing twice") {
  const Layout source(
      {{"w", DType::kInt8, {6, 6}}}, {{0, "x", 36}, {1, "x", 36}},
      {{"w", {{1, 1}, {4, 4}}, 0, "x", 0, {4, 1}}, {"w", {{0, 0}, {6, 6}}, 1, "x", 0, {6, 1}}}, {},
      {{1, 1}});
  const Plan it = plan(source, sharded("w", DType::kInt8, {6, 6}, 0, 1));
  CHECK(it.steps().size() == 5);
  CHECK(it.copy(0).source_rank == 0);
  CHECK(it.copy(0).region == Region{{1, 1}, {4, 4}});
  CHECK(it.proof().copied_bytes == 36);
}

TEST_CASE("what cannot be planned says which tensor, region and ranks") {
  const Layout rows = sharded("w", DType::kFloat32, {8, 8}, 0, 4);
  const Layout columns = sharded("w", DType::kFloat32, {8, 8}, 1, 2);
  bad({"'w'", "[2:4, 0:4]", "destination rank 0", "source ranks [0, 2, 3]"},
      [&] { plan(Layout::merge({rows.of_rank(0), rows.of_rank(2), rows.of_rank(3)}), columns); });
  bad({"'v'", "destination rank 0", "[0, 1, 2, 3]"},
      [&] { plan(rows, sharded("v", DType::kFloat32, {8, 8}, 1, 2)); });
  bad({"'w'", "(8, 8)", "(8, 4)"},
      [&] { plan(rows, sharded("w", DType::kFloat32, {8, 4}, 1, 2)); });
  bad({"'w'", "float32", "float16", "rank 0"},
      [&] { plan(rows, sharded("w", DType::kFloat16, {8, 8}, 1, 2)); });
  bad({"'w'", "no source", "destination rank 0"},
      [&] { plan(Layout(rows.tensors(), {}, {}), columns); });
}

TEST_CASE("destination bytes written twice or not at all") {
  const Layout source = sharded("w", DType::kInt8, {8}, 0, 1);
  const auto destination = [](std::int64_t nbytes, std::int64_t second,
                              std::vector<Padding> padding) {
    return Layout({{"w", DType::kInt8, {8}}}, {{3, "x", nbytes}},
                  {{"w", {{0}, {4}}, 3, "x", 0, {1}}, {"w", {{4}, {4}}, 3, "x", second, {1}}},
                  std::move(padding));
  };
  CHECK(plan(source, destination(8, 4, {})).proof().padding_bytes == 0);
  CHECK(plan(source, destination(12, 8, {{3, "x", 4, 4}})).proof() == Proof{12, 8, 4, 2});
  bad({"[2:4)", "'x'", "rank 3", "written twice", "'w' region [0:4]", "'w' region [4:8]"},
      [&] { plan(source, destination(6, 2, {})); });
  bad({"[4:8)", "rank 3", "not be written", "'w' region [4:8]"},
      [&] { plan(source, destination(12, 8, {})); });
  bad({"[8:9)", "rank 3", "not be written", "end of the buffer"},
      [&] { plan(source, destination(9, 4, {})); });
  bad({"written twice", "padding"}, [&] { plan(source, destination(8, 4, {{3, "x", 7, 1}})); });
  bad({"written twice", "'w' region [0:8]"}, [&] {
    plan(source,
         Layout({{"w", DType::kInt8, {8}}}, {{0, "x", 1}}, {{"w", {{0}, {8}}, 0, "x", 0, {0}}}));
  });
}

TEST_CASE("the proof catches a planner that lies") {
  const Layout source = sharded("w", DType::kInt8, {8, 2}, 0, 2);
  const Layout destination = sharded("w", DType::kInt8, {8, 2}, 1, 2);
  const std::vector<Step> good = plan(source, destination).steps();
  REQUIRE(good.size() == 4);
  CHECK_NOTHROW(prove(source, destination, good));
  std::vector<Step> steps = good;
  SUBCASE("a step is missing") {
    steps.pop_back();
    bad({"'w'", "[0:8, 1:2]", "rank 1", "8 elements", "writes 4"},
        [&] { prove(source, destination, steps); });
  }
  SUBCASE("a step is there twice") {
    steps.push_back(steps.front());
    bad({"'w'", "[0:4, 0:1]", "rank 0", "more than once", "[0, 0]"},
        [&] { prove(source, destination, steps); });
  }
  SUBCASE("two steps overlap in part") {
    steps[1].region = {{3, 0}, {4, 1}};
    steps[1].source_fragment = 1;
    bad({"'w'", "[3:7, 0:1]", "source rank 1"}, [&] { prove(source, destination, steps); });
  }
  SUBCASE("the volume is right, but one row is there twice and another not at all") {
    const Layout whole = sharded("w", DType::kInt8, {8, 2}, 0, 1);
    for (const std::int64_t begin : {0, 1, 3, 5}) {
      const std::vector<Step> shifted = {
          {0, 0, {{begin, 0}, {2, 2}}}, {0, 0, {{begin + 1, 0}, {2, 2}}}, {0, 0, {{0, 0}, {4, 2}}}};
      bad({"'w'", "rank 0", "more than once"}, [&] { prove(whole, whole, shifted); });
    }
  }
  SUBCASE("a step reads what its source does not hold") {
    steps[0].source_fragment = 1 - steps[0].source_fragment;
    bad({"'w'", "source rank 1"}, [&] { prove(source, destination, steps); });
  }
  SUBCASE("a step writes outside its fragment") {
    steps[0].region.extent[1] = 2;
    bad({"'w'", "destination rank 0"}, [&] { prove(source, destination, steps); });
  }
  SUBCASE("a step copies nothing") {
    steps.push_back(steps.front());
    steps.back().region.extent[0] = 0;
    bad({"'w'"}, [&] { prove(source, destination, steps); });
  }
  SUBCASE("a step names a fragment that does not exist") {
    steps[0].source_fragment = 9;
    bad({"fragment 9"}, [&] { prove(source, destination, steps); });
  }
}

TEST_CASE("a 0-d tensor, an empty tensor, an unused tensor") {
  const Layout layout(
      {{"s", DType::kInt64, {}}, {"e", DType::kInt8, {0, 3}}, {"u", DType::kInt8, {3}}},
      {{0, "x", 8}}, {{"s", {}, 0, "x", 0, {}}, {"e", {{0, 0}, {0, 3}}, 0, "x", 8, {3, 1}}});
  const Plan it = plan(layout, layout);
  CHECK(it.steps().size() == 1);
  CHECK(it.nbytes() == 8);
  bad({"'s'", "more than once"}, [&] { prove(layout, layout, {it.steps()[0], it.steps()[0]}); });
  CHECK(plan(Layout(), Layout()).proof() == Proof{});
}

}  // namespace kimisys::reshard
