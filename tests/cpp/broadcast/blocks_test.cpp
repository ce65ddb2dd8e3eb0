#include "broadcast/blocks.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>

#include "reshard/box.h"
#include "reshard/sample.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Layout;
using reshard::Region;
using reshard::test::dense_strides;

Layout dense(DType dtype, const Dims& shape) {
  const reshard::Tensor tensor{"t", dtype, shape};
  return Layout(
      {tensor}, {{0, "m", tensor.elements() * itemsize(dtype)}},
      {{"t", {Dims(shape.size(), 0), shape}, 0, "m", 0, dense_strides(shape, itemsize(dtype))}});
}

// The blocks are disjoint and together are the fragments; the tables of bands and chunks agree.
void check_partition(const Layout& layout) {
  const Blocks cut(layout);
  std::map<std::size_t, std::vector<Region>> by_fragment;
  for (const Block& block : cut.blocks()) {
    CHECK(!block.region.empty());
    CHECK(block.region.elements() <= kMaxBlockElements);
    by_fragment[block.fragment].push_back(block.region);
  }
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    const Region& whole = layout.fragments()[i].region;
    const std::vector<Region>& parts = by_fragment[i];
    std::int64_t elements = 0;
    for (std::size_t a = 0; a < parts.size(); ++a) {
      CHECK(reshard::contains(whole, parts[a]));
      elements += parts[a].elements();
      for (std::size_t b = 0; b < a; ++b) CHECK(!reshard::overlap(parts[a], parts[b]));
    }
    CHECK(elements == whole.elements());
  }
  for (const auto begins : {cut.band_begins(), cut.chunk_begins()}) {
    CHECK(begins.front() == 0);
    CHECK(begins.back() == cut.blocks().size());
    CHECK(std::adjacent_find(begins.begin(), begins.end(), std::greater_equal<>()) == begins.end());
  }
  for (const std::size_t begin : cut.chunk_begins()) {
    CHECK(std::binary_search(cut.band_begins().begin(), cut.band_begins().end(), begin));
  }
}

TEST_CASE("blocks partition the fragments of any layout") {
  reshard::test::Random random(5);
  for (int round = 0; round < 50; ++round) {
    const Layout layout = random.layout(
        {{"a", DType::kFloat32, random.shape()}, {"b", DType::kInt8, {3, 5}}}, 2, true);
    check_partition(layout.of_rank(0));
  }
  check_partition(dense(DType::kBFloat16, {}));
  check_partition(dense(DType::kBFloat16, {1}));
  check_partition(dense(DType::kBFloat16, {(1 << 20) + 5}));
  check_partition(dense(DType::kBFloat16, {300, 1024}));
  check_partition(dense(DType::kBFloat16, {3, 1 << 20}));
  check_partition(dense(DType::kInt8, {5, 700, 999}));
  check_partition(dense(DType::kInt64, {40, 30, 20, 50}));
}

TEST_CASE("the last dimension is cut for ranks that split it, in whole cache lines") {
  const auto last_extents = [](DType dtype, const Dims& shape) {
    const Blocks cut(dense(dtype, shape));
    return std::pair(cut.band_begins()[1], cut.blocks()[0].region.extent);
  };
  CHECK(last_extents(DType::kBFloat16, {600, 1024}) == std::pair(std::size_t{2}, Dims{512, 512}));
  CHECK(last_extents(DType::kBFloat16, {64, 16384}) == std::pair(std::size_t{16}, Dims{64, 1024}));
  CHECK(last_extents(DType::kBFloat16, {64, 1032}) == std::pair(std::size_t{1}, Dims{64, 1032}));
  CHECK(last_extents(DType::kInt8, {64, 1024 + 64}) == std::pair(std::size_t{1}, Dims{64, 1088}));
  CHECK(last_extents(DType::kInt8, {64, 2176}) == std::pair(std::size_t{2}, Dims{64, 1088}));
  CHECK(last_extents(DType::kBFloat16, {1 << 20}) == std::pair(std::size_t{1}, Dims{1 << 18}));
  CHECK(last_extents(DType::kBFloat16, {2, 1 << 20}) ==
        std::pair(std::size_t{16}, Dims{2, 1 << 16}));
}

TEST_CASE("a layout without elements has no blocks and no chunks") {
  const Blocks cut(dense(DType::kFloat32, {0, 4}));
  CHECK(cut.blocks().empty());
  CHECK(cut.chunk_count() == 0);
}

}  // namespace
}  // namespace kimisys::broadcast
