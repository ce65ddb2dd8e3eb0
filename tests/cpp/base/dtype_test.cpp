#include "base/dtype.h"

#include <doctest/doctest.h>

#include "base/error.h"
#include "expect.h"

namespace kimisys {

TEST_CASE("names and sizes go there and back") {
  for (const char* name :
       {"float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "int8", "int32", "int64"}) {
    CHECK(dtype_name(parse_dtype(name)) == name);
    CHECK(itemsize(parse_dtype(name)) > 0);
  }
  CHECK(itemsize(DType::kFloat8E4M3FN) == 1);
  CHECK(itemsize(DType::kInt64) == 8);
  test::expect_error(ErrorCode::kLayout, {"float64", "float32"}, [] { parse_dtype("float64"); });
}

TEST_CASE("rounding to bfloat16 is to nearest, ties to even") {
  CHECK(bfloat16_bits(0x3f800000) == 0x3f80);  // 1.0
  CHECK(bfloat16_bits(0x3f807fff) == 0x3f80);  // just below half: down
  CHECK(bfloat16_bits(0x3f808000) == 0x3f80);  // half, even below: down
  CHECK(bfloat16_bits(0x3f818000) == 0x3f82);  // half, odd below: up
  CHECK(bfloat16_bits(0x3f808001) == 0x3f81);  // just above half: up
  CHECK(bfloat16_bits(0x80000000) == 0x8000);  // -0
  CHECK(bfloat16_bits(0x00000001) == 0x0000);  // smallest denormal
  CHECK(bfloat16_bits(0x00018000) == 0x0002);  // denormals round like the others
  CHECK(bfloat16_bits(0x7f7fffff) == 0x7f80);  // largest finite: infinity
  CHECK(bfloat16_bits(0x7f800000) == 0x7f80);
  CHECK(bfloat16_bits(0xff800000) == 0xff80);
}

TEST_CASE("a NaN stays a NaN, whatever its payload") {
  for (const std::uint32_t bits :
       {0x7f800001U, 0x7fc00000U, 0x7fffffffU, 0xffffffffU, 0xff800001U}) {
    const std::uint16_t narrow = bfloat16_bits(bits);
    CHECK((narrow & 0x7f80) == 0x7f80);
    CHECK((narrow & 0x007f) != 0);
  }
}

TEST_CASE("bfloat16 to float32 and back is the identity on all numbers") {
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto narrow = static_cast<std::uint16_t>(bits);
    const bool is_nan = (narrow & 0x7fff) > 0x7f80;
    if (!is_nan) CHECK_EQ(bfloat16_bits(float32_bits(narrow)), narrow);
  }
}

}  // namespace kimisys
