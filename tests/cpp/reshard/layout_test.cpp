#include "reshard/layout.h"

#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <sstream>

#include "expect.h"
#include "reshard/sample.h"

namespace kimisys::reshard {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

void bad(std::initializer_list<const char*> words, const std::function<void()>& action) {
  kimisys::test::expect_error(ErrorCode::kLayout, words, action);
}

Layout one(Tensor tensor, Buffer buffer, Fragment fragment) {
  return {{std::move(tensor)}, {std::move(buffer)}, {std::move(fragment)}};
}

// For each element held, the rank and the byte of every fragment that holds it.
using Holders = std::map<Dims, std::vector<std::pair<std::int64_t, std::int64_t>>>;

Holders holders(const Layout& layout) {
  Holders all;
  for (const Fragment& fragment : layout.fragments()) {
    for (std::int64_t flat = 0; flat < fragment.region.elements(); ++flat) {
      Dims place(fragment.region.extent.size());
      std::int64_t rest = flat;
      std::int64_t byte = fragment.byte_offset;
      for (std::size_t d = place.size(); d-- > 0;) {
        const std::int64_t i = rest % fragment.region.extent[d];
        rest /= fragment.region.extent[d];
        place[d] = fragment.region.offset[d] + i;
        byte += i * fragment.byte_strides[d];
      }
      all[place].emplace_back(fragment.rank, byte);
    }
  }
  return all;
}

}  // namespace

TEST_CASE("tables are sorted, fragments keep their order") {
  const Layout layout({{"b", DType::kInt8, {2}}, {"a", DType::kInt8, {2}}},
                      {{1, "x", 2}, {0, "y", 2}, {0, "x", 2}},
                      {{"b", {{0}, {2}}, 1, "x", 0, {1}}, {"a", {{0}, {2}}, 0, "y", 0, {1}}},
                      {{0, "x", 0, 2}}, {{3}, {1, 2}});
  CHECK(layout.tensors()[0].name == "a");
  CHECK(layout.buffers()[0] == Buffer{0, "x", 2});
  CHECK(layout.buffers()[2] == Buffer{1, "x", 2});
  CHECK(layout.fragments()[0].tensor == "b");
  CHECK(layout.tensor_of(0) == 1);
  CHECK(layout.buffer_of(0) == 2);
  CHECK(layout.buffer_of_padding(0) == 0);
  CHECK(layout.ranks() == std::vector<std::int64_t>{0, 1, 3});
  CHECK(layout.place_of(1).node == 2);
  CHECK(layout.place_of(0) == Place{0, 0, 0, 0});
}

TEST_CASE("what a layout may not be") {
  const Tensor w{"w", DType::kFloat32, {4, 4}};
  const Buffer x{2, "x", 64};
  const Region all{{0, 0}, {4, 4}};
  CHECK_NOTHROW(one(w, x, {"w", all, 2, "x", 0, {16, 4}}));
  bad({"'w'", "twice"}, [&] { Layout({w, w}, {}, {}); });
  bad({"'x'", "rank 2", "twice"}, [&] { Layout({}, {x, x}, {}); });
  bad({"'v'", "tensor table"}, [&] { one(w, x, {"v", all, 2, "x", 0, {16, 4}}); });
  bad({"'w'", "'x'", "rank 1"}, [&] { one(w, x, {"w", all, 1, "x", 0, {16, 4}}); });
  bad({"[1:5, 0:4]", "'w'", "rank 2"},
      [&] { one(w, x, {"w", {{1, 0}, {4, 4}}, 2, "x", 0, {16, 4}}); });
  bad({"dimension 0"}, [&] { one(w, x, {"w", {{kHuge, 0}, {1, 4}}, 2, "x", 0, {16, 4}}); });
  bad({"dimension 1"}, [&] { one(w, x, {"w", {{0, 0}, {4, -1}}, 2, "x", 0, {16, 4}}); });
  bad({"'w'", "dimensions"}, [&] { one(w, x, {"w", {{0}, {4}}, 2, "x", 0, {16}}); });
  bad({"dimensions"}, [&] { one(w, x, {"w", all, 2, "x", 0, {16}}); });
  bad({"negative byte stride"}, [&] { one(w, x, {"w", all, 2, "x", 0, {16, -4}}); });
  bad({"64 bytes", "ends at 68"}, [&] { one(w, x, {"w", all, 2, "x", 4, {16, 4}}); });
  bad({"byte -4"}, [&] { one(w, x, {"w", all, 2, "x", -4, {16, 4}}); });
  bad({"more than 2^63"}, [&] { one(w, x, {"w", all, 2, "x", 0, {kHuge, kHuge}}); });
  bad({"padding", "'x'"}, [&] { Layout({}, {x}, {}, {{2, "x", 60, 5}}); });
  bad({"padding", "'x'"}, [&] { Layout({}, {x}, {}, {{2, "x", 60, -5}}); });
  bad({"padding", "'y'"}, [&] { Layout({}, {x}, {}, {{2, "y", 0, 1}}); });
  bad({"two places"}, [&] { Layout({}, {}, {}, {}, {{1}, {1, 2}}); });
  bad({"negative"}, [&] { Layout({}, {}, {}, {}, {{1, -1}}); });
  bad({"negative rank"}, [&] { Layout({}, {{-1, "x", 4}}, {}); });
  bad({"size -4"}, [&] { Layout({}, {{0, "x", -4}}, {}); });
  bad({"empty name"}, [&] { Layout({{"", DType::kInt8, {}}}, {}, {}); });
  bad({"empty name"}, [&] { Layout({}, {{0, "", 4}}, {}); });
  bad({"'t'", "-2"}, [&] { Layout({{"t", DType::kInt8, {-2}}}, {}, {}); });
  bad({"64 bits"}, [&] { Layout({{"t", DType::kInt8, {kHuge, kHuge}}}, {}, {}); });
  bad({"'t'", "larger"}, [&] { Layout({{"t", DType::kFloat32, {kHuge}}}, {}, {}); });
  bad({"more than 8 dimensions"}, [&] { Layout({{"t", DType::kInt8, Dims(9, 1)}}, {}, {}); });
}

TEST_CASE("zero sizes and zero dimensions are legal") {
  CHECK_NOTHROW(one({"t", DType::kInt64, {}}, {0, "x", 8}, {"t", {}, 0, "x", 0, {}}));
  CHECK_NOTHROW(one({"t", DType::kInt64, {0, kHuge}}, {0, "x", 0},
                    {"t", {{0, 5}, {0, 9}}, 0, "x", 0, {kHuge, kHuge}}));
}

TEST_CASE("merge joins ranks and refuses contradictions") {
  const Layout whole = test::sharded("w", DType::kFloat32, {8, 4}, 0, 4);
  const Layout merged =
      Layout::merge({whole.of_rank(0), whole.of_rank(1), whole.of_rank(2), whole.of_rank(3)});
  CHECK(merged == whole);
  CHECK(Layout::merge({}) == Layout());
  bad({"'w'", "rank 0", "twice"}, [&] { Layout::merge({whole, whole.of_rank(0)}); });
  bad({"'w'", "(8, 4)", "(4, 8)"},
      [&] { Layout::merge({whole, test::sharded("w", DType::kFloat32, {4, 8}, 0, 4)}); });
  bad({"float32", "bfloat16"},
      [&] { Layout::merge({whole, test::sharded("w", DType::kBFloat16, {8, 4}, 0, 4)}); });
  bad({"rank 1", "places"},
      [] { Layout::merge({Layout({}, {}, {}, {}, {{1, 0}}), Layout({}, {}, {}, {}, {{1, 1}})}); });
}

TEST_CASE("a cover holds what the layout holds, once") {
  test::Random random(3);
  for (int round = 0; round < 200; ++round) {
    const Tensor tensor{"t", DType::kInt8, random.shape()};
    const Region whole{Dims(tensor.shape.size(), 0), tensor.shape};
    std::vector<Buffer> buffers;
    std::vector<Fragment> fragments;
    for (std::int64_t rank = 5; rank >= 0; --rank) {
      const Region region = random.between(0, 4) == 0 ? whole : random.part_of(whole);
      buffers.push_back({rank, "x", region.elements()});
      fragments.push_back({"t", region, rank, "x", 0, test::dense_strides(region.extent, 1)});
    }
    const Layout layout({tensor}, buffers, fragments);
    const Layout cover = layout.cover();
    CHECK(cover.buffers() == layout.buffers());
    // In the layout an element has owners; in the cover only the lowest rank of them, at its byte.
    Holders lowest = holders(layout);
    for (auto& entry : lowest) {
      std::sort(entry.second.begin(), entry.second.end());
      entry.second.resize(1);
    }
    CHECK(holders(cover) == lowest);
  }
}

TEST_CASE("layouts and fragments print themselves") {
  std::ostringstream text;
  text << test::sharded("w", DType::kFloat32, {8, 4}, 0, 2) << " "
       << Fragment{"w", {{0, 4}, {8, 4}}, 1, "x", 16, {32, 4}} << " " << Region{{kHuge}, {kHuge}};
  CHECK(text.str() ==
        "Layout(1 tensors, 2 fragments, 0 paddings in 2 buffers, 128 bytes on ranks [0, 1]) "
        "Fragment('w' [0:8, 4:8] at rank 1 'x' + 16, byte strides (32, 4)) "
        "[9223372036854775807:beyond 2^63]");
}

}  // namespace kimisys::reshard
