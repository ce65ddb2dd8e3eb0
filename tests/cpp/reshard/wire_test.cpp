#include <doctest/doctest.h>

#include <string>

#include "expect.h"
#include "reshard/sample.h"

namespace kimisys::reshard {
namespace {

const std::string kText =
    R"({"format":"kimisys.layout","version":1,"tensors":[["w","float32",[4]]],)"
    R"("buffers":[[0,"x",20]],"fragments":[[0,[0],[4],0,0,[4]]],"padding":[[0,16,4]],)"
    R"("places":[[0,0,0,0]]})";

std::string with(const std::string& from, const std::string& to) {
  std::string text = kText;
  return text.replace(text.find(from), from.size(), to);
}

}  // namespace

TEST_CASE("the text form is stable and comes back equal") {
  const Layout layout({{"w", DType::kFloat32, {4}}}, {{0, "x", 20}},
                      {{"w", {{0}, {4}}, 0, "x", 0, {4}}}, {{0, "x", 16, 4}}, {{0}});
  CHECK(layout.to_json() == kText);
  CHECK(Layout::from_json(kText) == layout);
  test::Random random(4);
  for (int round = 0; round < 100; ++round) {
    const Layout sample = random.layout(
        {{"a\"\\\n", DType::kBFloat16, random.shape()}, {"é", DType::kInt64, random.shape()}}, 3,
        true);
    CHECK(Layout::from_json(sample.to_json()) == sample);
  }
}

TEST_CASE("malformed text is a LayoutError that names the place") {
  const auto bad = [](const std::string& text, std::initializer_list<const char*> words) {
    CAPTURE(text);
    kimisys::test::expect_error(ErrorCode::kLayout, words, [&] { Layout::from_json(text); });
  };
  bad("", {"JSON"});
  bad("[]", {"object"});
  bad("{}", {"'format'", "missing"});
  bad(with("kimisys.layout", "other"), {"other"});
  bad(with("\"version\":1", "\"version\":2"), {"version"});
  bad(with("\"places\"", "\"spaces\""), {"'spaces'"});
  bad(with("[4]]],", "[4]],[]],"), {"tensors[1]", "3"});
  bad(with("\"float32\"", "\"float33\""), {"float33"});
  bad(with("\"float32\",[4]", "\"float32\",4"), {"tensors[0][2]", "array"});
  bad(with("\"float32\",[4]", "\"float32\",[\"4\"]"), {"tensors[0][2][0]", "integer"});
  bad(with("\"float32\",[4]", "\"float32\",[true]"), {"integer"});
  bad(with("\"w\"", "7"), {"tensors[0][0]", "string"});
  bad(with("\"w\"", "null"), {"string"});
  bad(with("[[0,\"x\",20]]", "[]"), {"fragments[0][3]", "0 entries"});
  bad(with("[[0,[0],[4],0", "[[1,[0],[4],0"), {"fragments[0][0]"});
  bad(with("[[0,[0],[4],0", "[[-1,[0],[4],0"), {"fragments[0][0]"});
  bad(with("[[0,[0],[4],0", "[[0,[0],[5],0"), {"leaves the tensor"});
  bad(with("\"x\",20", "\"x\",12"), {"leaves buffer"});
  bad(with("[[0,16,4]]", "[[0,16]]"), {"padding[0]"});
  bad(with("[[0,16,4]]", "[[0,16,4,4]]"), {"padding[0]", "4 entries"});
  bad(with("[[0,16,4]]", "[[0,16,5]]"), {"padding"});
  bad(with("[[0,0,0,0]]", "[[0,0,0,0],[0,0,0,0]]"), {"places"});
}

TEST_CASE("any single changed byte is either a valid layout or a LayoutError") {
  test::Random random(5);
  for (int round = 0; round < 5000; ++round) {
    std::string text = kText;
    const auto last = static_cast<std::int64_t>(text.size()) - 1;
    text[static_cast<std::size_t>(random.between(0, last))] =
        static_cast<char>(random.between(-128, 127));
    if (random.between(0, 3) == 0) text.resize(static_cast<std::size_t>(random.between(0, last)));
    try {
      const Layout layout = Layout::from_json(text);
      CHECK(Layout::from_json(layout.to_json()) == layout);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kLayout);
    }
  }
}

}  // namespace kimisys::reshard
