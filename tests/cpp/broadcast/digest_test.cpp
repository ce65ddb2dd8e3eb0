#include "broadcast/digest.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <set>

#include "base/error.h"
#include "broadcast/mix.h"
#include "expect.h"
#include "reshard/sample.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Fragment;
using reshard::Layout;
using reshard::Memories;
using reshard::Memory;
using reshard::Region;
using reshard::Tensor;
using test::expect_error;

using Bytes = std::vector<std::byte>;

Bytes random_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

Memories memory_of(Bytes& bytes) {
  return {Memory{bytes.data(), static_cast<std::int64_t>(bytes.size()), true}};
}

// One whole tensor, dense in one buffer.
Layout dense(DType dtype, const Dims& shape, const std::string& name = "t") {
  const Tensor tensor{name, dtype, shape};
  const std::int64_t nbytes = tensor.elements() * itemsize(dtype);
  return Layout({tensor}, {{0, "m", nbytes}},
                {{name,
                  {Dims(shape.size(), 0), shape},
                  0,
                  "m",
                  0,
                  reshard::test::dense_strides(shape, itemsize(dtype))}});
}

TEST_CASE("every implementation gives the naive sum, for every width, alignment and length") {
  for (const DType dtype : {DType::kUInt8, DType::kBFloat16, DType::kFloat32, DType::kInt64}) {
    for (const std::int64_t length : {0, 1, 2, 7, 8, 9, 31, 64, 100, 1000}) {
      for (const std::int64_t shift : {0, 1, 3}) {
        const std::int64_t size = itemsize(dtype);
        Bytes bytes = random_bytes(static_cast<std::size_t>(length * size + shift), 1);
        const Layout layout({{"t", dtype, {length + 5}}}, {{0, "m", length * size + shift}},
                            {{"t", {{5}, {length}}, 0, "m", shift, {size}}});
        const auto expected = digest(layout, memory_of(bytes), 1, "naive");
        for (const std::string_view name : digest_implementations()) {
          CAPTURE(name);
          CHECK(digest(layout, memory_of(bytes), 1, name) == expected);
        }
      }
    }
  }
}

TEST_CASE("strided, transposed and interleaved fragments agree with the dense one") {
  constexpr std::int64_t kRows = 37;
  constexpr std::int64_t kColumns = 53;
  Bytes plain = random_bytes(kRows * kColumns * 2, 2);
  const auto expected = digest(dense(DType::kBFloat16, {kRows, kColumns}), memory_of(plain));

  Bytes transposed(plain.size());
  Bytes spread(plain.size() * 3);
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t c = 0; c < kColumns; ++c) {
      const std::byte* from = plain.data() + 2 * (r * kColumns + c);
      std::memcpy(transposed.data() + 2 * (c * kRows + r), from, 2);
      std::memcpy(spread.data() + 6 * (r * kColumns + c) + 4, from, 2);
    }
  }
  const Tensor tensor{"t", DType::kBFloat16, {kRows, kColumns}};
  const Region all{{0, 0}, {kRows, kColumns}};
  const Layout column_major({tensor}, {{0, "m", kRows * kColumns * 2}},
                            {{"t", all, 0, "m", 0, {2, 2 * kRows}}});
  const Layout every_third({tensor}, {{0, "m", kRows * kColumns * 6}},
                           {{"t", all, 0, "m", 4, {6 * kColumns, 6}}});
  for (const std::string_view name : digest_implementations()) {
    CHECK(digest(column_major, memory_of(transposed), 1, name) == expected);
    CHECK(digest(every_third, memory_of(spread), 1, name) == expected);
  }
}

TEST_CASE("parts add up mod 2^64, whatever the number of threads") {
  constexpr std::int64_t kRows = 600;
  constexpr std::int64_t kColumns = 700;  // more than one tile
  Bytes bytes = random_bytes(kRows * kColumns * 4, 3);
  const Layout whole = dense(DType::kFloat32, {kRows, kColumns});
  const auto expected = digest(whole, memory_of(bytes), 1, "naive");
  for (const std::size_t threads : {0U, 1U, 2U, 5U}) {
    CHECK(digest(whole, memory_of(bytes), threads) == expected);
  }
  std::uint64_t sum = 0;
  for (const auto& [begin, end] : {std::pair{0, 100}, {100, 101}, {101, 600}}) {
    const Layout part({whole.tensors()[0]}, {whole.buffers()[0]},
                      {{"t",
                        {{begin, 0}, {end - begin, kColumns}},
                        0,
                        "m",
                        begin * kColumns * 4,
                        {kColumns * 4, 4}}});
    sum += digest(part, memory_of(bytes))[0];
  }
  CHECK(sum == expected[0]);
}

TEST_CASE("a long run is cut into tiles without a seam") {
  Bytes bytes = random_bytes((1U << 19U) + 12345, 4);
  const Layout layout = dense(DType::kInt8, {static_cast<std::int64_t>(bytes.size())});
  const auto expected = digest(layout, memory_of(bytes), 1, "naive");
  for (const std::string_view name : digest_implementations()) {
    CHECK(digest(layout, memory_of(bytes), 3, name) == expected);
  }
}

TEST_CASE("0-d tensors count as one element, empty ones as nothing") {
  Bytes bytes = random_bytes(4, 5);
  std::uint32_t bits = 0;
  std::memcpy(&bits, bytes.data(), 4);
  CHECK(digest(dense(DType::kFloat32, {}), memory_of(bytes))[0] == mix(tensor_key("t"), bits));
  Bytes none;
  CHECK(digest(dense(DType::kFloat32, {3, 0}), memory_of(none))[0] == 0);
}

TEST_CASE("zeros, names and positions count") {
  Bytes zeros(64);
  const auto four = digest(dense(DType::kFloat32, {4}), memory_of(zeros = Bytes(16)))[0];
  const auto five = digest(dense(DType::kFloat32, {5}), memory_of(zeros = Bytes(20)))[0];
  CHECK(four != 0);
  CHECK(four != five);
  CHECK(digest(dense(DType::kFloat32, {5}, "u"), memory_of(zeros))[0] != five);
}

TEST_CASE("each (index, bits) has a word of its own, also for values that look like indices") {
  std::set<std::uint64_t> seen;
  for (std::uint64_t index = 0; index < 1000; ++index) {
    for (std::uint64_t bits = 0; bits < 256; ++bits) {
      seen.insert(mix(tensor_key("t") + index * kGolden, bits));
    }
  }
  CHECK(seen.size() == 1000 * 256);
}

TEST_CASE("mix avalanches: every bit of the element flips every bit of the word half of the time") {
  std::mt19937_64 random(6);
  for (const int width : {8, 16, 32, 64}) {
    for (int in = 0; in < width; ++in) {
      std::array<int, 64> flips{};
      constexpr int kSamples = 2000;
      for (int i = 0; i < kSamples; ++i) {
        const std::uint64_t counter = tensor_key("w") + static_cast<std::uint64_t>(i) * kGolden;
        const std::uint64_t bits = random() >> (64 - width);
        const std::uint64_t changed = bits ^ (std::uint64_t{1} << in);
        const std::uint64_t difference = mix(counter, fold(bits)) ^ mix(counter, fold(changed));
        for (int out = 0; out < 64; ++out)
          flips[static_cast<std::size_t>(out)] += static_cast<int>((difference >> out) & 1U);
      }
      const auto [low, high] = std::minmax_element(flips.begin(), flips.end());
      CAPTURE(width);
      CAPTURE(in);
      CHECK(*low > kSamples * 0.42);  // seven standard deviations
      CHECK(*high < kSamples * 0.58);
    }
  }
}

TEST_CASE("wrong memory and unknown implementations are refused by name") {
  Bytes bytes(12);
  const Layout layout = dense(DType::kFloat32, {4});
  expect_error(ErrorCode::kBufferMismatch, {"buffer 'm' of rank 0 with 16 bytes, got 12"},
               [&] { digest(layout, memory_of(bytes)); });
  expect_error(ErrorCode::kBufferMismatch, {"buffer 'm' of rank 0", "tensor 't'"},
               [&] { digest(layout, {}); });
  expect_error(ErrorCode::kLayout, {"unknown digest implementation 'fast'", "naive"},
               [&] { digest(layout, memory_of(bytes), 1, "fast"); });
}

}  // namespace
}  // namespace kimisys::broadcast
