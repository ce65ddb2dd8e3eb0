#include "reshard/symbolic.h"

#include <doctest/doctest.h>

#include <functional>
#include <map>

#include "base/bytes.h"
#include "base/fingerprint.h"
#include "base/lists.h"
#include "expect.h"
#include "reshard/choice.h"
#include "reshard/sample.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {
namespace {

using test::sharded;
using test::share;

void bad(ErrorCode code, std::initializer_list<const char*> words,
         const std::function<void()>& action) {
  kimisys::test::expect_error(code, words, action);
}

std::shared_ptr<const SymbolicLayout> layers(std::size_t dim, std::vector<Instance> instances) {
  const auto ranks = static_cast<std::int64_t>(instances.front().ranks.size());
  return std::make_shared<const SymbolicLayout>(std::vector<LayoutBlock>{
      {share(sharded("{}.w", DType::kInt8, {8, 8}, dim, ranks)), std::move(instances)}});
}

}  // namespace

TEST_CASE("lists: items by key, in their order; negative keys are left out") {
  const std::vector<std::int64_t> keys = {2, 0, -1, 2, 0};
  const Lists lists(4, keys.size(), [&](std::size_t i) { return keys[i]; });
  CHECK(lists.size() == 4);
  const auto items = [&](std::size_t k) {
    return std::vector<std::size_t>(lists[k].begin(), lists[k].end());
  };
  CHECK(items(0) == std::vector<std::size_t>{1, 4});
  CHECK(items(1).empty());
  CHECK(items(2) == std::vector<std::size_t>{0, 3});
  CHECK(Lists().size() == 0);
}

TEST_CASE("numbers of all sizes read back, and nothing else is read") {
  ByteWriter out;
  const std::vector<std::int64_t> numbers = {0, 1, -1, 63, -64, 64, 1 << 20, INT64_MAX, INT64_MIN};
  for (const std::int64_t number : numbers) {
    out.signed_number(number);
    out.number(static_cast<std::uint64_t>(number));
  }
  out.text("text");
  const std::string bytes = out.take();
  ByteReader in(bytes, ErrorCode::kLayout, "numbers");
  for (const std::int64_t number : numbers) {
    CHECK(in.signed_number() == number);
    CHECK(in.number() == static_cast<std::uint64_t>(number));
  }
  CHECK(in.text() == "text");
  in.end();
  const auto read = [](std::string_view text) {
    ByteReader(text, ErrorCode::kLayout, "it").number();
  };
  bad(ErrorCode::kLayout, {"it", "cut off"}, [&] { read("\xff"); });
  bad(ErrorCode::kLayout, {"64 bits"}, [&] { read("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"); });
  bad(ErrorCode::kLayout, {"items", "1 bytes are left"},
      [] { ByteReader("\x02z", ErrorCode::kLayout, "it").text(); });
}

TEST_CASE("fingerprints differ for texts that differ little") {
  std::map<std::string, std::string> known;
  std::string text(40, '\0');
  for (std::size_t size = 0; size <= text.size(); ++size) {
    for (std::size_t bit = 0; bit < 8 * size; ++bit) {
      std::string other = text.substr(0, size);
      other[bit / 8] = static_cast<char>(1U << (bit % 8));
      CHECK(known.emplace(fingerprint(other), other).second);
    }
    CHECK(known.emplace(fingerprint(text.substr(0, size)), "").second);
  }
  CHECK(fingerprint("").size() == 32);
}

TEST_CASE("names are spelled out wherever the braces stand") {
  CHECK(expand("layers.{}.w", "17") == "layers.17.w");
  CHECK(expand("{}", "") == "");
  CHECK(expand("{}.{}", "a") == "a.a");
  CHECK(expand("{", "a") == "{");
  CHECK(expand("w{}", "{}") == "w{}");
}

TEST_CASE("equal blocks are planned once, whatever ranks they run on") {
  const auto source = layers(0, {{"0", {0, 1}, "0"}, {"1", {2, 3}, "1"}, {"2", {0, 1}, "2"}});
  const auto destination =
      layers(1, {{"0", {0, 1, 2, 3}, "0"}, {"1", {0, 1, 2, 3}, "1"}, {"2", {0, 1, 2, 3}, "2"}});
  const SymbolicPlan plan(source, destination);
  CHECK(plan.groups().size() == 1);
  CHECK(plan.proof() == Proof{192, 192, 0, 24});
  CHECK(plan.proof() ==
        make_plan(share(source->concrete()), share(destination->concrete())).proof());
  CHECK(plan.of_rank(3).proof() == Proof{48, 48, 0, 6});
  CHECK(plan.of_rank(3).source().ranks() == std::vector<std::int64_t>{0, 1, 2, 3});
  CHECK(plan.of_source(2).proof() == Proof{32, 32, 0, 4});
  CHECK(plan.traffic().size() == 16);
  CHECK(plan.traffic().front() == SymbolicPlan::Traffic{0, 0, 16, 2});
}

TEST_CASE("ranks that share a node with some layers' ranks make a group of their own") {
  const auto block = share(sharded("{}.w", DType::kInt8, {8, 8}, 0, 2));
  const auto side = [&](std::vector<Place> places) {
    return std::make_shared<const SymbolicLayout>(
        std::vector<LayoutBlock>{{block, {{"0", {0, 1}, "0"}, {"1", {2, 3}, "1"}}}},
        std::move(places));
  };
  const std::vector<Place> apart = {{0, 5}, {1, 5}, {2, 6}, {3, 6}};
  const std::vector<Place> other = {{0, 5}, {1, 5}, {2, 9}, {3, 9}};
  CHECK(SymbolicPlan(side(apart), side({})).groups().size() == 1);
  CHECK(SymbolicPlan(side(apart), side(apart)).groups().size() == 1);
  CHECK(SymbolicPlan(side(apart), side(other)).groups().size() == 2);
}

TEST_CASE("replicas: the busiest NIC is near the best of all assignments") {
  // Pieces of 7 sizes that any of 3 NICs can send, against all 3^7 assignments.
  const std::vector<std::int64_t> sizes = {7, 7, 6, 6, 5, 4, 4};
  std::vector<Tensor> tensors;
  std::vector<Buffer> buffers;
  std::vector<Fragment> fragments;
  for (std::size_t t = 0; t < sizes.size(); ++t) {
    const std::string name = "t" + std::to_string(t);
    tensors.push_back({name, DType::kInt8, {sizes[t]}});
    for (std::int64_t rank = 0; rank < 3; ++rank) {
      buffers.push_back({rank, name, sizes[t]});
      fragments.push_back({name, {{0}, {sizes[t]}}, rank, name, 0, {1}});
    }
  }
  const Layout source(tensors, buffers, fragments, {}, {{0, 0, 0, 0}, {1, 0, 1, 1}, {2, 0, 2, 2}});
  std::vector<Fragment> wanted;
  std::vector<Buffer> into;
  for (const Tensor& it : tensors) {
    into.push_back({0, it.name, it.shape[0]});
    wanted.push_back({it.name, {{0}, it.shape}, 0, it.name, 0, {1}});
  }
  const Plan plan = make_plan(share(source), share(Layout(tensors, into, wanted, {}, {{0, 9}})));
  std::map<std::int64_t, std::int64_t> sent;
  for (std::size_t i = 0; i < plan.steps().size(); ++i) {
    sent[plan.copy(i).source_rank] += plan.steps()[i].region.elements();
  }
  std::int64_t most = 0;
  for (const auto& entry : sent) most = std::max(most, entry.second);
  std::int64_t best = INT64_MAX;
  for (int code = 0; code < 2187; ++code) {
    std::array<std::int64_t, 3> sums{};
    for (int i = 0, rest = code; i < 7; ++i, rest /= 3) {
      sums[static_cast<std::size_t>(rest % 3)] += sizes[static_cast<std::size_t>(i)];
    }
    best = std::min(best, std::max({sums[0], sums[1], sums[2]}));
  }
  CHECK(best == 13);
  CHECK(3 * most <= 4 * best);
}

TEST_CASE("exchanges mend what largest-first leaves") {
  // Largest first leaves 3+2+2 and 3+2; one 3 against a 2 makes both 6.
  Loads loads;
  const std::vector<Placement> instances = {{{{0, 0, 0, 0}, {1, 0, 1, 1}}, {{0, 9}}}};
  Chooser chooser(instances, loads);
  std::vector<OpenChoice> choices;
  std::vector<Candidate> candidates = {{0, 0}, {0, 1}};
  for (const std::int64_t bytes : {3, 3, 2, 2, 2}) choices.push_back({0, 0, 2, bytes, true, 0});
  chooser.choose(choices, candidates);
  CHECK(std::max(loads.nic_bytes[0], loads.nic_bytes[1]) == 6);
}

TEST_CASE("a block with a bad instance, an unknown rank") {
  bad(ErrorCode::kLayout, {"'0'", "1 ranks", "local rank 1"}, [] {
    SymbolicLayout({{share(sharded("{}.w", DType::kInt8, {8}, 0, 2)), {{"0", {3}, "0"}}}});
  });
  bad(ErrorCode::kLayout, {"no layout"}, [] { SymbolicLayout({{nullptr, {{"0", {3}, "0"}}}}); });
  const auto side = layers(0, {{"0", {4, 5}, "0"}});
  bad(ErrorCode::kPlan, {"no destination rank 3", "[4, 5]"},
      [&] { SymbolicPlan(side, side).of_rank(3); });
}

TEST_CASE("random plans read back from their bytes") {
  for (unsigned seed = 0; seed < 50; ++seed) {
    test::Random random(seed);
    const std::vector<Tensor> tensors = {{"{}.a", DType::kFloat32, random.shape()},
                                         {"{}.b", DType::kInt8, random.shape()}};
    const auto plan =
        make_plan(share(random.layout(tensors, 3, true)), share(random.layout(tensors, 3, false)));
    const Plan again = Plan::from_bytes(plan.to_bytes());
    CHECK(again.source() == plan.source());
    CHECK(again.destination() == plan.destination());
    CHECK(again.steps() == plan.steps());
    CHECK(again.fingerprint() == plan.fingerprint());
    CHECK(Layout::from_bytes(plan.source().to_bytes()) == plan.source());
  }
}

}  // namespace kimisys::reshard
