#include "reshard/rows.h"

#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "reshard/sample.h"
#include "reshard/stream.h"

namespace kimisys::reshard {
namespace {

constexpr std::size_t kMargin = 64;

std::vector<std::byte> random_bytes(test::Random& random, std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.between(0, 255));
  return bytes;
}

// One element, straight from the definition.
void copy_one(DType from, DType to, const std::byte* source, std::byte* destination) {
  std::uint32_t bits = 0;
  if (from == to) {
    std::memcpy(destination, source, static_cast<std::size_t>(itemsize(from)));
  } else if (from == DType::kFloat32) {
    std::memcpy(&bits, source, 4);
    const std::uint16_t narrow = bfloat16_bits(bits);
    std::memcpy(destination, &narrow, 2);
  } else {
    std::memcpy(reinterpret_cast<std::byte*>(&bits) + 2, source, 2);
    std::memcpy(destination, &bits, 4);
  }
}

}  // namespace

TEST_CASE("every row, at every alignment and length, writes its elements and nothing else") {
  test::Random random(8);
  const std::vector<std::pair<DType, DType>> dtypes = {
      {DType::kUInt8, DType::kUInt8},      {DType::kBFloat16, DType::kBFloat16},
      {DType::kFloat32, DType::kFloat32},  {DType::kInt64, DType::kInt64},
      {DType::kFloat32, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};
  for (const RowSet& set : row_sets()) {
    for (const auto& [from, to] : dtypes) {
      for (const RowKind kind :
           {RowKind::kStrided, RowKind::kGathered, RowKind::kDense, RowKind::kStreaming}) {
        const bool is_spread = kind == RowKind::kStrided || kind == RowKind::kGathered;
        for (int round = 0; round < 200; ++round) {
          const std::int64_t n = round < 100 ? round : random.between(100, 3000);
          const std::int64_t read = itemsize(from) + (is_spread ? random.between(0, 5) : 0);
          const std::int64_t write =
              itemsize(to) + (kind == RowKind::kStrided ? random.between(0, 5) : 0);
          const auto source_at = static_cast<std::size_t>(random.between(0, 63));
          const auto destination_at = static_cast<std::size_t>(random.between(0, 63));
          const auto source = random_bytes(random, static_cast<std::size_t>(n * read) + kMargin);
          auto written = random_bytes(random, static_cast<std::size_t>(n * write) + 2 * kMargin);
          auto expected = written;
          for (std::int64_t i = 0; i < n; ++i) {
            copy_one(from, to, source.data() + source_at + i * read,
                     expected.data() + destination_at + i * write);
          }
          choose_row(from, to, kind, set)(n, source.data() + source_at, read,
                                          written.data() + destination_at, write);
          finish_streaming();
          CAPTURE(set.name);
          CHECK(written == expected);
        }
      }
    }
  }
}

}  // namespace kimisys::reshard
