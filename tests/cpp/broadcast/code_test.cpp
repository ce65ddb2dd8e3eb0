#include "broadcast/code.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "base/error.h"
#include "broadcast/blocks.h"
#include "expect.h"

namespace kimisys::broadcast {
namespace {

using test::expect_error;

using Bytes = std::vector<std::byte>;
using Positions = std::vector<std::uint32_t>;

Bytes random_bytes(std::size_t count, std::mt19937& random) {
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

Positions random_positions(std::int64_t elements, double density, std::mt19937& random) {
  std::bernoulli_distribution changed(density);
  Positions positions;
  for (std::int64_t i = 0; i < elements; ++i) {
    if (changed(random)) positions.push_back(static_cast<std::uint32_t>(i));
  }
  return positions;
}

// Encodes, checks what the descriptor says, decodes and compares. Returns the descriptor.
Descriptor round_trip(const Positions& positions, std::int64_t elements, std::int64_t itemsize,
                      std::mt19937& random) {
  const auto item = static_cast<std::size_t>(itemsize);
  const Bytes values = random_bytes(positions.size() * item, random);
  Bytes payload(3, std::byte{0xab});  // appended to what is there, at any alignment
  const Descriptor descriptor = encode(positions, values.data(), elements, itemsize, payload);
  CHECK(Descriptor::of(descriptor.word()) == descriptor);
  CHECK(payload.size() == 3 + descriptor.nbytes);
  CHECK(std::count(payload.begin(), payload.begin() + 3, std::byte{0xab}) == 3);
  check_descriptor(descriptor, elements, itemsize);
  if (descriptor.kind == Kind::kGaps || descriptor.kind == Kind::kBitmap) {
    // A copy of its own size: the sanitizer sees any byte read beyond.
    const Bytes own(payload.begin() + 3, payload.end());
    Positions scratch;
    const Decoded decoded = decode(descriptor, own, elements, itemsize, scratch);
    CHECK(std::equal(decoded.positions.begin(), decoded.positions.end(), positions.begin(),
                     positions.end()));
    CHECK(std::memcmp(decoded.values, values.data(), values.size()) == 0);
  }
  return descriptor;
}

TEST_CASE("what is encoded is decoded, at every density, size and width") {
  std::mt19937 random(1);
  for (const std::int64_t elements : {1, 2, 7, 8, 9, 63, 64, 65, 1000, 4096, 262144}) {
    for (const double density : {0.0, 0.0001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0}) {
      for (const std::int64_t itemsize : {1, 2, 4, 8}) {
        CAPTURE(elements);
        CAPTURE(density);
        const Positions positions = random_positions(elements, density, random);
        const Descriptor descriptor = round_trip(positions, elements, itemsize, random);
        CHECK((descriptor.kind == Kind::kSame) == positions.empty());
        CHECK(descriptor.nbytes <= elements * itemsize);
      }
    }
  }
}

TEST_CASE("one change anywhere in the largest block, and the first and last alone") {
  std::mt19937 random(2);
  for (std::uint32_t at = 0; at < kMaxBlockElements; at = at * 2 + 1) {
    CHECK(round_trip({at}, kMaxBlockElements, 2, random).nbytes <= 10);
  }
  round_trip({0, kMaxBlockElements - 1}, kMaxBlockElements, 8, random);
}

TEST_CASE("clusters take no more than a bitmap, and no block more than its bits") {
  std::mt19937 random(3);
  for (const std::int64_t run : {1, 3, 64, 1000, 20000}) {
    for (const std::int64_t every : {2, 5, 40, 1000}) {
      Positions positions;
      for (std::int64_t i = 0; i < 100000; ++i) {
        if (i / run % every == 0) positions.push_back(static_cast<std::uint32_t>(i));
      }
      const Descriptor descriptor = round_trip(positions, 100000, 2, random);
      CHECK(descriptor.nbytes <= 12500 + 2 * positions.size());
      CHECK(descriptor.nbytes <= 200000);
    }
  }
}

TEST_CASE("at random densities gaps come close to the entropy") {
  std::mt19937 random(4);
  for (const double density : {0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3}) {
    const Positions positions = random_positions(kMaxBlockElements, density, random);
    const double p = static_cast<double>(positions.size()) / kMaxBlockElements;
    const double entropy = -p * std::log2(p) - (1 - p) * std::log2(1 - p);
    const double nbytes = round_trip(positions, kMaxBlockElements, 2, random).nbytes;
    CHECK(nbytes / static_cast<double>(positions.size()) < 1.03 * entropy / (8 * p) + 2 + 0.03);
  }
}

TEST_CASE("mutated payloads are refused or give ascending positions within the block") {
  std::mt19937 random(6);
  const auto below = [&random](std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(random);
  };
  int refused = 0;
  constexpr int kRounds = 20000;
  Positions scratch;
  for (int round = 0; round < kRounds; ++round) {
    const auto elements = static_cast<std::int64_t>(below(2000) + 1);
    const std::int64_t itemsize = std::int64_t{1} << below(4);
    const double density = std::vector{0.002, 0.02, 0.2, 0.7}[below(4)];
    const Positions positions = random_positions(elements, density, random);
    const Bytes values(positions.size() * static_cast<std::size_t>(itemsize));
    Bytes payload;
    Descriptor descriptor = encode(positions, values.data(), elements, itemsize, payload);
    for (std::size_t i = below(4); i > 0 && !payload.empty(); --i) {
      payload[below(payload.size())] ^= static_cast<std::byte>(1U << below(8));
    }
    if (below(4) == 0) payload.resize(below(payload.size() + 9));
    if (below(2) == 0) descriptor.nbytes = static_cast<std::uint32_t>(payload.size());
    if (below(4) == 0) descriptor = Descriptor::of(descriptor.word() ^ 1U << below(7));
    const Bytes own(payload);  // no spare capacity
    try {
      const Decoded decoded = decode(descriptor, own, elements, itemsize, scratch);
      const auto& found = decoded.positions;
      CHECK(std::is_sorted(found.begin(), found.end(), std::less_equal<>()));
      CHECK(found.back() < elements);
      CHECK(decoded.values + found.size() * static_cast<std::size_t>(itemsize) ==
            own.data() + own.size());
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kSnapshot);
      ++refused;
    }
  }
  CHECK(refused > kRounds / 10);
  CHECK(refused < kRounds * 9 / 10);
}

TEST_CASE("descriptors and payloads that encode cannot have written are refused") {
  const auto refused = [](std::initializer_list<const char*> words, Descriptor descriptor,
                          const std::vector<int>& bytes) {
    Bytes payload;
    for (const int byte : bytes) payload.push_back(static_cast<std::byte>(byte));
    Positions scratch;
    expect_error(ErrorCode::kSnapshot, words, [&] { decode(descriptor, payload, 16, 2, scratch); });
  };
  refused({"kind 0"}, {Kind::kSame, 0, 0}, {});
  refused({"kind 0", "1 bytes"}, {Kind::kSame, 0, 1}, {0});
  refused({"kind 3"}, {Kind::kWhole, 0, 0}, {});
  refused({"parameter 19"}, {Kind::kGaps, 19, 3}, {1, 1, 0});
  refused({"parameter 1"}, {Kind::kBitmap, 1, 4}, {1, 0, 7, 7});
  refused({"32 bytes"}, {Kind::kGaps, 0, 32}, std::vector<int>(32));
  refused({"has 3 bytes", "says 4"}, {Kind::kGaps, 0, 4}, {1, 1, 7});
  refused({"within the count"}, {Kind::kGaps, 0, 1}, {0x80});
  refused({"announces 0"}, {Kind::kGaps, 0, 4}, {0, 1, 7, 7});
  refused({"announces 17"}, {Kind::kGaps, 0, 4}, {17, 1, 7, 7});
  refused({"cannot hold the 2"}, {Kind::kGaps, 0, 4}, {2, 1, 7, 7});
  refused({"run past"}, {Kind::kGaps, 0, 4}, {1, 0, 0, 0});
  refused({"9 bits of 1 bytes"}, {Kind::kGaps, 0, 4}, {1, 0, 1, 0});
  refused({"1 bits of 1 bytes"}, {Kind::kGaps, 0, 4}, {1, 3, 7, 7});  // padding
  refused({"end at element 17"}, {Kind::kGaps, 4, 6}, {1, 0x02, 0, 0, 7, 7});
  refused({"cannot hold the bitmap"}, {Kind::kBitmap, 0, 1}, {1});
  refused({"has 0 bits"}, {Kind::kBitmap, 0, 4}, {0, 0, 7, 7});
  refused({"has 2 bits"}, {Kind::kBitmap, 0, 4}, {1, 1, 7, 7});
}

}  // namespace
}  // namespace kimisys::broadcast
