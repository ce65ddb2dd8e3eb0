#include "base/json.h"

#include <doctest/doctest.h>

#include "expect.h"

namespace kimisys {
namespace {

Json parse(std::string_view text) { return parse_json(text, ErrorCode::kLayout); }

}  // namespace

TEST_CASE("values") {
  CHECK(*parse(" -12 ").get_if<std::int64_t>() == -12);
  CHECK(*parse("9223372036854775807").get_if<std::int64_t>() == INT64_MAX);
  CHECK(*parse("true").get_if<bool>());
  CHECK(parse("null").get_if<bool>() == nullptr);
  CHECK(parse("[]").get_if<Json::Array>()->empty());
  const Json object = parse(R"({"a": [1, {"b": "c"}], "d": {}})");
  const auto& members = *object.get_if<Json::Object>();
  REQUIRE(members.size() == 2);
  CHECK(members[0].first == "a");
  CHECK(members[0].second.get_if<Json::Array>()->size() == 2);
}

TEST_CASE("strings") {
  CHECK(*parse(R"("a\"\\\/\b\f\n\r\tz")").get_if<std::string>() == "a\"\\/\b\f\n\r\tz");
  CHECK(*parse(R"("\u0041\u00e9\u20ac\ud83d\ude00")").get_if<std::string>() == "Aé€😀");
  CHECK(*parse("\"é€😀\"").get_if<std::string>() == "é€😀");
  const std::string nasty = std::string("\0\x01\x1f\"\\/é😀", 13);
  std::string written;
  write_json_string(nasty, written);
  CHECK(*parse(written).get_if<std::string>() == nasty);
}

TEST_CASE("everything malformed is an error with the code asked for") {
  const std::string deep(10000, '[');
  for (const std::string& text : {
           std::string(""),
           std::string("  "),
           std::string("nul"),
           std::string("[1,]"),
           std::string("[1 2]"),
           std::string("[1"),
           std::string("{\"a\":1,}"),
           std::string("{\"a\" 1}"),
           std::string("{a:1}"),
           std::string("{\"a\":1,\"a\":2}"),
           std::string("1 2"),
           std::string("01"),
           std::string("-"),
           std::string("+1"),
           std::string("1.5"),
           std::string("1e3"),
           std::string("NaN"),
           std::string("Infinity"),
           std::string("9223372036854775808"),
           std::string("\"abc"),
           std::string("\"\\x\""),
           std::string("\"\\u12\""),
           std::string("\"\\u12g4\""),
           std::string("\"\\ud800\""),
           std::string("\"\\udc00\""),
           std::string("\"\\ud800\\u0041\""),
           std::string("\"\n\""),
           std::string("\"\x80\""),
           std::string("\"\xc0\xaf\""),
           std::string("\"\xed\xa0\x80\""),
           std::string("\"\xf4\x90\x80\x80\""),
           std::string("\"\xe2\x82"),
           std::string("\"\xff\""),
           deep,
           std::string("\"\\"),
           std::string("{"),
       }) {
    CAPTURE(text);
    test::expect_error(ErrorCode::kSnapshot, {"malformed JSON at byte"},
                       [&] { parse_json(text, ErrorCode::kSnapshot); });
  }
}

}  // namespace kimisys
