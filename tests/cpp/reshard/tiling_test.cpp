#include "reshard/tiling.h"

#include <doctest/doctest.h>

namespace kimisys::reshard {
namespace {

using Kind = Violation::Kind;

}  // namespace

TEST_CASE("a piece takes its shortest form") {
  const Piece dense = make_piece(8, {3, 4, 5}, {80, 20, 4}, 4, 7);
  CHECK(dense.axes.empty());
  CHECK(dense.run == 240);
  CHECK(dense.owner == 7);
  const Piece transposed = make_piece(0, {3, 4}, {2, 6}, 2, 0);
  CHECK(transposed.axes.empty());
  CHECK(transposed.run == 24);
  const Piece rows = make_piece(0, {2, 3, 4}, {60, 20, 2}, 2, 0);
  REQUIRE(rows.axes.size() == 1);
  CHECK(rows.axes[0] == Piece::Axis{6, 20});
  CHECK(rows.run == 8);
}

TEST_CASE("exact tilings pass") {
  CHECK_FALSE(check_tiling({}, 0));
  CHECK_FALSE(check_tiling({make_piece(4, {4}, {2}, 2, 0), make_piece(0, {4}, {1}, 1, 1)}, 12));
  SUBCASE("rows of two fragments in turn") {
    CHECK_FALSE(check_tiling(
        {make_piece(0, {5, 3}, {10, 2}, 2, 0), make_piece(6, {5, 2}, {10, 2}, 2, 1)}, 50));
  }
  SUBCASE("single elements in turn, a billion of them, without listing them") {
    const std::int64_t many = 1 << 30;
    CHECK_FALSE(check_tiling({make_piece(0, {many}, {4}, 2, 0), make_piece(2, {many}, {4}, 2, 1)},
                             many * 4));
  }
  SUBCASE("nested periods") {
    CHECK_FALSE(check_tiling({make_piece(0, {3, 2}, {16, 4}, 2, 0),
                              make_piece(2, {3, 2}, {16, 4}, 2, 1), make_piece(8, {3}, {16}, 8, 2)},
                             48));
  }
  SUBCASE("different counts of rows: only the list of runs can tell") {
    CHECK_FALSE(check_tiling({make_piece(0, {4}, {4}, 2, 0), make_piece(2, {2}, {4}, 2, 1),
                              make_piece(10, {2}, {4}, 2, 2)},
                             16));
  }
}

TEST_CASE("holes and overlaps are found where they are") {
  const auto hole = check_tiling({make_piece(0, {}, {}, 4, 0), make_piece(6, {}, {}, 4, 1)}, 10);
  REQUIRE(hole);
  CHECK(hole->kind == Kind::kHole);
  CHECK(hole->begin == 4);
  CHECK(hole->end == 6);
  CHECK(*hole->before == 0);
  CHECK(*hole->after == 1);
  const auto tail = check_tiling({make_piece(0, {}, {}, 4, 0)}, 10);
  REQUIRE(tail);
  CHECK(tail->end == 10);
  CHECK_FALSE(tail->after);
  const auto overlap = check_tiling({make_piece(0, {}, {}, 6, 0), make_piece(4, {}, {}, 6, 1)}, 10);
  REQUIRE(overlap);
  CHECK(overlap->kind == Kind::kOverlap);
  CHECK(overlap->begin == 4);
  CHECK(overlap->end == 6);
  const auto same = check_tiling({make_piece(0, {8}, {0}, 4, 3)}, 4);
  REQUIRE(same);
  CHECK(same->kind == Kind::kOverlap);
  CHECK(*same->before == 3);
  const auto crossed =
      check_tiling({make_piece(0, {2}, {4}, 2, 0), make_piece(2, {3}, {4}, 2, 1)}, 12);
  REQUIRE(crossed);
  CHECK(crossed->kind == Kind::kHole);
  CHECK(crossed->begin == 8);
}

}  // namespace kimisys::reshard
