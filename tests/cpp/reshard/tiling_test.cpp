#include "reshard/tiling.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>

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

TEST_CASE("pieces with holes between them are apart") {
  const std::int64_t many = 1 << 30;
  CHECK_FALSE(check_apart({}));
  CHECK_FALSE(check_apart({make_piece(100, {}, {}, 4, 0), make_piece(6, {}, {}, 4, 1)}));
  SUBCASE("a billion runs that do not begin with their period, and what follows them") {
    CHECK_FALSE(check_apart({make_piece(10, {many}, {16}, 2, 0), make_piece(22, {many}, {16}, 2, 1),
                             make_piece(24 + (many - 1) * 16, {many}, {16}, 3, 2)}));
    const auto met = check_apart({make_piece(10, {many}, {16}, 2, 0),
                                  make_piece(23 + (many - 1) * 16, {many}, {16}, 3, 2),
                                  make_piece(22, {many}, {16}, 2, 1)});
    REQUIRE(met);
    CHECK(met->kind == Kind::kUnknown);
  }
  SUBCASE("only the list of runs can tell") {
    CHECK_FALSE(check_apart({make_piece(0, {4}, {4}, 1, 0), make_piece(2, {2}, {4}, 2, 1)}));
    const auto met = check_apart({make_piece(0, {4}, {4}, 3, 0), make_piece(10, {2}, {4}, 1, 1)});
    REQUIRE(met);
    CHECK(met->kind == Kind::kOverlap);
    CHECK(met->begin == 10);
    CHECK(met->end == 11);
  }
}

TEST_CASE("both checks agree with counting every byte") {
  for (unsigned seed = 0; seed < 20000; ++seed) {
    std::minstd_rand random(seed + 1);
    const auto below = [&](unsigned limit) { return static_cast<std::int64_t>(random() % limit); };
    std::vector<Piece> pieces;
    std::map<std::int64_t, int> count;
    for (std::size_t owner = 0; owner < 1 + seed % 3; ++owner) {
      const Dims extent = {1 + below(3), 1 + below(3)};
      const Dims strides = {below(13), below(7)};
      const std::int64_t offset = below(12);
      const std::int64_t run = 1 + below(3);
      pieces.push_back(make_piece(offset, extent, strides, run, owner));
      for (std::int64_t i = 0; i < extent[0]; ++i) {
        for (std::int64_t j = 0; j < extent[1]; ++j) {
          for (std::int64_t k = 0; k < run; ++k)
            ++count[offset + i * strides[0] + j * strides[1] + k];
        }
      }
    }
    const bool apart = std::ranges::all_of(count, [](const auto& it) { return it.second == 1; });
    const std::int64_t end = count.rbegin()->first + 1;
    const bool whole = apart && static_cast<std::int64_t>(count.size()) == end;
    CHECK(check_apart(pieces).has_value() == !apart);
    CHECK(check_tiling(pieces, end).has_value() == !whole);
    CHECK(check_tiling(pieces, end + 1).has_value());
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
