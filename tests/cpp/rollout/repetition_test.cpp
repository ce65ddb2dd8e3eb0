#include "rollout/repetition.h"

#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "expect.h"

namespace kimisys::rollout {
namespace {

using Tokens = std::vector<std::int32_t>;

constexpr RepetitionConfig kSmall = {
    .max_period = 24, .min_tokens = 20, .min_repeats = 3, .agreement = 0.9};

// Whether the text so far loops with this period, by the definition.
bool loops(const Tokens& text, std::int64_t end, std::int64_t period,
           const RepetitionConfig& config) {
  const std::int64_t window = std::max(config.min_tokens, config.min_repeats * period);
  if (window > end) return false;
  std::int64_t equal = 0;
  for (std::int64_t i = end - window + period; i < end; ++i) {
    equal += text[static_cast<std::size_t>(i)] == text[static_cast<std::size_t>(i - period)];
  }
  return static_cast<double>(equal) >=
         config.agreement * static_cast<double>(window - period) - 1e-9;
}

// The first position that loops, with its shortest period.
std::optional<Repetition> naive(const Tokens& text, const RepetitionConfig& config) {
  for (std::int64_t end = 1; end <= static_cast<std::int64_t>(text.size()); ++end) {
    for (std::int64_t period = 1; period <= config.max_period; ++period) {
      if (loops(text, end, period, config)) return Repetition{.position = end, .period = period};
    }
  }
  return std::nullopt;
}

Tokens random_tokens(std::size_t count, std::int32_t vocabulary, std::uint64_t seed) {
  std::mt19937_64 source(seed);
  Tokens tokens(count);
  for (std::int32_t& token : tokens) {
    token = static_cast<std::int32_t>(source() % static_cast<std::uint64_t>(vocabulary));
  }
  return tokens;
}

void append(Tokens& text, const Tokens& more, int times = 1) {
  for (int i = 0; i < times; ++i) text.insert(text.end(), more.begin(), more.end());
}

std::optional<Repetition> detect(const Tokens& text, const RepetitionConfig& config) {
  RepetitionDetector detector(config);
  return detector.feed(text);
}

void expect_as_naive(const Tokens& text, const RepetitionConfig& config) {
  const auto wanted = naive(text, config);
  const auto got = detect(text, config);
  REQUIRE(got.has_value() == wanted.has_value());
  if (!wanted) return;
  CHECK(got->position == wanted->position);
  CHECK(got->period == wanted->period);
  CHECK(got->agreement >= config.agreement - 1e-9);
  CHECK(got->start < got->position);
}

}  // namespace

TEST_CASE("random texts of small alphabets loop where the definition says so") {
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    INFO("seed " << seed);
    expect_as_naive(random_tokens(300, seed % 2 == 0 ? 2 : 3, seed), kSmall);
  }
}

TEST_CASE("planted loops, exact and with changes, are found where the definition says so") {
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    INFO("seed " << seed);
    std::mt19937_64 source(seed);
    Tokens text = random_tokens(source() % 100, 5, seed);
    append(text, random_tokens(1 + source() % 30, 5, seed + 1), 9);
    for (std::int32_t& token : text) {
      if (source() % 100 < seed % 12) token = 7;
    }
    RepetitionConfig config = kSmall;
    config.agreement = seed % 3 == 0 ? 1.0 : seed % 3 == 1 ? 0.9 : 0.8;
    expect_as_naive(text, config);
  }
}

TEST_CASE("equal tokens are a loop of period one") {
  const auto found = detect(Tokens(1000, 5), {.agreement = 1.0});
  REQUIRE(found.has_value());
  CHECK(found->position == 512);
  CHECK(found->start == 0);
  CHECK(found->period == 1);
  CHECK(found->agreement == 1.0);
}

TEST_CASE("a loop after a hundred thousand tokens is found with its start and period") {
  Tokens text = random_tokens(100'000, 50'000, 3);
  append(text, random_tokens(400, 50'000, 4), 7);
  const auto found = detect(text, {.agreement = 1.0});
  REQUIRE(found.has_value());
  CHECK(found->position == 100'000 + 6 * 400);
  CHECK(found->start == 100'000);
  CHECK(found->period == 400);
}

TEST_CASE("a loop longer than max_period is none, and the one inside it is not hidden by it") {
  Tokens text;
  append(text, random_tokens(513, 50'000, 5), 12);
  CHECK_FALSE(detect(text, {}).has_value());
  CHECK(detect(text, {.max_period = 513}).has_value());
}

TEST_CASE("of nested loops the one that holds is found") {
  // a b a b a b ... c, again and again: by 0.99 the inner period does not hold, the outer does.
  Tokens inner;
  append(inner, {1, 2}, 15);
  inner.push_back(3);
  Tokens text;
  append(text, inner, 20);
  const auto outer = detect(text, {.agreement = 0.99});
  REQUIRE(outer.has_value());
  CHECK(outer->period == 31);
  const auto both = detect(text, {.agreement = 0.8});
  REQUIRE(both.has_value());
  CHECK(both->period == 2);
}

TEST_CASE("a counter in an otherwise equal loop is a near-repeat") {
  Tokens text = random_tokens(1000, 50'000, 6);
  const Tokens sentence = random_tokens(19, 50'000, 7);
  for (std::int32_t i = 0; i < 40; ++i) {
    append(text, sentence);
    text.push_back(100'000 + i);
  }
  const auto found = detect(text, {.agreement = 0.9});
  REQUIRE(found.has_value());
  CHECK(found->period == 20);
  CHECK(found->start >= 1000);
  CHECK(found->position <= 1000 + 512);
  CHECK(found->agreement < 1.0);
  CHECK_FALSE(detect(text, {.agreement = 1.0}).has_value());
}

TEST_CASE("a loop whose period drifts with each round is none") {
  Tokens text;
  const Tokens sentence = random_tokens(60, 50'000, 8);
  for (std::size_t i = 0; i < 40; ++i) {
    append(text, sentence);
    append(text, random_tokens(1 + i, 50'000, 100 + i));
  }
  CHECK_FALSE(detect(text, {}).has_value());
}

TEST_CASE("a text of all grams, each of them once, does not loop") {
  Tokens text;  // a de Bruijn sequence: 2^12 tokens of {0, 1}, by the greedy rule
  std::vector<bool> seen(1U << 12);
  std::uint32_t state = 0;
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const std::uint32_t one = (state << 1 | 1) & 0xfff;
    state = seen[one] ? one ^ 1U : one;
    seen[state] = true;
    text.push_back(static_cast<std::int32_t>(state & 1));
  }
  const RepetitionConfig config = {.agreement = 1.0};
  CHECK(detect(text, config).has_value() == naive(text, config).has_value());
}

TEST_CASE("the answer does not depend on how the tokens come, and is kept") {
  Tokens text = random_tokens(5000, 3, 9);
  append(text, random_tokens(77, 3, 10), 8);
  const auto whole = detect(text, {});
  REQUIRE(whole.has_value());
  RepetitionDetector detector;
  for (std::size_t i = 0, step = 1; i < text.size(); i += step, step = 1 + i % 97) {
    detector.feed(std::span(text).subspan(i, std::min(step, text.size() - i)));
  }
  REQUIRE(detector.found().has_value());
  CHECK(detector.found()->position == whole->position);
  CHECK(detector.found()->period == whole->period);
  CHECK(detector.feed(random_tokens(1000, 50'000, 11))->position == whole->position);
  CHECK(detector.position() == whole->position);
}

TEST_CASE("settings that make no sense are refused by name") {
  const auto refused = [](const RepetitionConfig& config, const char* field) {
    test::expect_error(ErrorCode::kScheduler, {"RepetitionConfig", field},
                       [&] { RepetitionDetector{config}; });
  };
  refused({.max_period = 0}, "max_period is 0");
  refused({.min_tokens = 0}, "min_tokens is 0");
  refused({.min_repeats = 1}, "min_repeats is 1");
  refused({.agreement = 0.0}, "agreement is 0");
  refused({.agreement = 1.5}, "agreement is 1.5");
  refused({.agreement = std::nan("")}, "agreement is nan");
  refused({.max_period = 1 << 20, .min_repeats = 1 << 20}, "make one of them smaller");
}

}  // namespace kimisys::rollout
