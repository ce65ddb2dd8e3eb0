#include "reshard/gaps.h"

#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "reshard/stream.h"

namespace kimisys::reshard {
namespace {

struct World {
  DType from;
  DType to;
  std::int64_t planes;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t gap;     // bytes between rows of the source
  std::int64_t offset;  // of the destination, past a cache line
};

// Whether the world was copied over its gaps; if so, what was written is compared with the naive
// executor. The source ends with its last row: nothing behind it may be read.
bool copied_as_the_naive_one(const World& world, const RowSet& set) {
  const std::int64_t row = world.columns * itemsize(world.from);
  const std::int64_t pitch = row + world.gap;
  const std::int64_t plane = world.rows * pitch;
  std::vector<std::byte> source(static_cast<std::size_t>(world.planes * plane - world.gap));
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 37 >> 3);
  const std::int64_t written = world.columns * itemsize(world.to);
  const auto bytes = static_cast<std::size_t>(world.planes * world.rows * written);
  // Lines of 64 bytes, and a byte on each side that must stay.
  std::vector<std::byte> ours(bytes + 192, std::byte{0xee});
  std::vector<std::byte> naive = ours;
  const auto at = [&](std::vector<std::byte>& memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 + world.offset;
  };
  Block block{.source = source.data(),
              .destination = at(ours),
              .dims = 3,
              .source_dtype = world.from,
              .destination_dtype = world.to};
  block.axes[0] = {world.planes, plane, world.rows * written};
  block.axes[1] = {world.rows, pitch, written};
  block.axes[2] = {world.columns, itemsize(world.from), itemsize(world.to)};
  if (!copy_over_gaps(block, set)) return false;
  finish_streaming();
  block.destination = at(naive);
  execute_naive({&block, 1}, {});
  CHECK(std::memcmp(at(ours) - 1, at(naive) - 1, bytes + 2) == 0);
  return true;
}

}  // namespace

TEST_CASE("rows copied over gaps, in turns, are those of the naive implementation") {
  for (const RowSet& set : row_sets()) {
    CAPTURE(set.name);
    for (const auto& [from, to] : {std::pair{DType::kBFloat16, DType::kBFloat16},
                                   {DType::kUInt8, DType::kUInt8},
                                   {DType::kFloat32, DType::kBFloat16},
                                   {DType::kBFloat16, DType::kFloat32}}) {
      for (const std::int64_t rows : {1, 2, 3, 8, 9, 21}) {
        for (const std::int64_t columns : {200, 256, 1000, 5000}) {
          for (const std::int64_t offset : {1, 4, 60}) {
            CHECK(copied_as_the_naive_one({from, to, 2, rows, columns, 100, offset}, set));
          }
        }
      }
    }
  }
}

TEST_CASE("rows without gaps, and short ones far apart, are left to others") {
  const RowSet& set = row_sets().front();
  CHECK_FALSE(copied_as_the_naive_one({DType::kUInt8, DType::kUInt8, 1, 4, 512, 0, 1}, set));
  CHECK_FALSE(copied_as_the_naive_one({DType::kUInt8, DType::kUInt8, 1, 4, 512, 513, 1}, set));
  CHECK(copied_as_the_naive_one({DType::kUInt8, DType::kUInt8, 1, 4, 512, 512, 1}, set));
  CHECK(copied_as_the_naive_one({DType::kUInt8, DType::kUInt8, 1, 4, 4096, 9999, 1}, set));
}

}  // namespace kimisys::reshard
