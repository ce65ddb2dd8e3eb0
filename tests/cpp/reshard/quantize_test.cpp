#include "reshard/quantize.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "expect.h"
#include "reshard/quantize_kernels.h"
#include "reshard/sample.h"

namespace kimisys::reshard {
namespace {

using test::share;
using test::Store;

constexpr std::int64_t kRows = 9;
constexpr std::int64_t kColumns = 77;
constexpr BlockShape kBlock = {4, 32};

// One matrix whose rows are `gap` bytes apart, at an odd byte of its buffer.
Layout matrix(DType dtype, std::int64_t gap) {
  const std::int64_t stride = kColumns * itemsize(dtype) + gap;
  return {{{"w", dtype, {kRows, kColumns}}},
          {{0, "w", 1 + kRows * stride}},
          {{"w", {{0, 0}, {kRows, kColumns}}, 0, "w", 1, {stride, itemsize(dtype)}}}};
}

Layout quantized_matrix() {
  const Dims blocks = {3, 3};
  return {{{"w", DType::kFloat8E4M3FN, {kRows, kColumns}}, {"s", DType::kFloat32, blocks}},
          {{0, "w", kRows * kColumns}, {0, "s", 9 * 4 + 1}},
          {{"w", {{0, 0}, {kRows, kColumns}}, 0, "w", 0, {kColumns, 1}},
           {"s", {{0, 0}, blocks}, 0, "s", 1, {12, 4}}}};
}

void write(DType dtype, float value, std::byte* at) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  if (dtype == DType::kBFloat16) bits >>= 16U;
  std::memcpy(at, &bits, static_cast<std::size_t>(itemsize(dtype)));
}

Quantizer quantizer(DType dtype, std::int64_t gap) {
  return {share(matrix(dtype, gap)), share(quantized_matrix()), {{0, 0, 1}}, kBlock};
}

void bad(std::initializer_list<const char*> words, const std::function<void()>& action) {
  kimisys::test::expect_error(ErrorCode::kLayout, words, action);
}

}  // namespace

TEST_CASE("float8: the branch-free rounding is the definition's, and NaN lies beyond 464") {
  std::mt19937 random(7);
  for (int i = 0; i < 200000; ++i) {
    const auto exponent = static_cast<int>(random() % 24) - 15;
    const float value = std::ldexp(static_cast<float>(random() % 4096), exponent - 8);
    const float clipped = std::fmin(value, 464.0F);
    CHECK(float8_bits(clipped) == float8_in_range(clipped));
    CHECK(float8_bits(-clipped) == float8_in_range(-clipped));
  }
  CHECK(float8_bits(448) == 0x7e);
  CHECK(float8_bits(464) == 0x7e);
  CHECK(float8_bits(464.1F) == 0x7f);
  CHECK(float8_bits(0x1p-9F) == 1);
  CHECK(float8_bits(0x1p-10F) == 0);   // a tie, to even
  CHECK(float8_bits(0x1.8p-9F) == 2);  // another
  CHECK(float8_bits(-0.0F) == 0x80);
  CHECK((float8_bits(std::numeric_limits<float>::quiet_NaN()) & 0x7f) == 0x7f);
}

TEST_CASE("every implementation writes what the naive one does, off every alignment") {
  std::mt19937 random(8);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const std::int64_t gap : {0, 3}) {
      const Layout source = matrix(dtype, gap);
      Store from(source);
      for (std::int64_t i = 0; i < kRows * kColumns; ++i) {
        const float value = std::ldexp(static_cast<float>(random() % 512) - 256,
                                       static_cast<int>(random() % 8) - 12);
        write(dtype, value,
              from.memories()[0]->data + 1 + i / kColumns * source.fragments()[0].byte_strides[0] +
                  i % kColumns * itemsize(dtype));
      }
      Store wanted(quantized_matrix());
      quantizer(dtype, gap).fill(from.memories(), wanted.memories(), {1, "naive"});
      for (const std::string& name : quantize_implementations()) {
        Store written(quantized_matrix());
        quantizer(dtype, gap).fill(from.memories(), written.memories(), {2, name});
        for (std::size_t b = 0; b < 2; ++b) {
          const Memory& a = *written.memories()[b];
          CHECK_MESSAGE(std::memcmp(a.data, wanted.memories()[b]->data,
                                    static_cast<std::size_t>(a.nbytes)) == 0,
                        name);
        }
      }
    }
  }
}

TEST_CASE("what is not finite is named by every implementation") {
  for (const std::string& name : quantize_implementations()) {
    const Layout source = matrix(DType::kBFloat16, 0);
    Store from(source, std::byte{0});
    write(DType::kBFloat16, std::numeric_limits<float>::infinity(),
          from.memories()[0]->data + 1 + (5 * kColumns + 6) * 2);
    Store to(quantized_matrix());
    kimisys::test::expect_error(ErrorCode::kNotFinite, {"'w'", "rank 0", "inf", "(5, 6)"}, [&] {
      quantizer(DType::kBFloat16, 0).fill(from.memories(), to.memories(), {2, name});
    });
  }
}

TEST_CASE("parts that do not fit are refused") {
  const auto source = share(matrix(DType::kBFloat16, 0));
  const auto quantized = share(quantized_matrix());
  bad({"fragment 1", "has 1"}, [&] { Quantizer(source, quantized, {{1, 0, 1}}, kBlock); });
  bad({"'s'", "float32", "float8_e4m3fn"},
      [&] { Quantizer(source, quantized, {{0, 1, 1}}, kBlock); });
  bad({"'s'", "is not 2 x 3"}, [&] { Quantizer(source, quantized, {{0, 0, 1}}, {8, 32}); });
  bad({"0 x 32", "weight_block_size"}, [&] { Quantizer(source, quantized, {{0, 0, 1}}, {0, 32}); });
  bad({"'w'", "float8_e4m3fn", "only bfloat16"},
      [&] { Quantizer(quantized, quantized, {{0, 0, 1}}, kBlock); });
  const auto halves = share(test::sharded("w", DType::kBFloat16, {12, 64}, 0, 2));
  bad({"'w'", "[0:6, 0:64]", "rank 0", "cuts a block of 4 x 32"},
      [&] { check_whole_blocks(*halves, 0, kBlock); });
}

}  // namespace kimisys::reshard
