#include "rollout/repetition.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"

namespace kimisys::rollout {
namespace {

constexpr std::int64_t kLongestGram = 16;
constexpr std::int64_t kChunk = 64;  // tokens compared between two looks at the count
constexpr std::int64_t kMostTokens = std::int64_t{1} << 26;
constexpr std::uint64_t kFactor = 0x9e3779b97f4a7c15U;  // odd, its bits without a pattern

std::uint64_t value_of(std::int32_t token) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(token)) + 1;
}

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

}  // namespace

void check(const RepetitionConfig& config) {
  const auto positive = [](const char* field, std::int64_t value, std::int64_t least) {
    KIMISYS_CHECK(value >= least && value <= kMostTokens, ErrorCode::kScheduler,
                  "RepetitionConfig: ", field, " is ", value, "; give ", least, " to ",
                  kMostTokens);
  };
  positive("max_period", config.max_period, 1);
  positive("min_tokens", config.min_tokens, 1);
  positive("min_repeats", config.min_repeats, 2);
  KIMISYS_CHECK(config.min_repeats * config.max_period <= kMostTokens, ErrorCode::kScheduler,
                "RepetitionConfig: max_period ", config.max_period, " times min_repeats ",
                config.min_repeats, " is the tokens that are kept, ", kMostTokens,
                " at most; make one of them smaller");
  KIMISYS_CHECK(config.agreement > 0 && config.agreement <= 1, ErrorCode::kScheduler,
                "RepetitionConfig: agreement is ", config.agreement,
                "; give a share above 0, at most 1");
}

RepetitionDetector::RepetitionDetector(const RepetitionConfig& config) : config_(config) {
  check(config);
  gram_ = kLongestGram;
  for (std::int64_t period = 1; period <= config.max_period; ++period) {
    // The mismatches allowed split a window into runs, of which the longest has at least this many.
    const std::int64_t longest = (window(period) - period) / (allowed(period) + 1);
    gram_ = std::min(gram_, std::max<std::int64_t>(longest, 1));
  }
  for (std::int64_t i = 0; i <= gram_; ++i) leaving_ *= kFactor;
  history_ = at(std::max(window(config.max_period), config.max_period + gram_) + 1);
  last_.assign(std::bit_ceil(at(2 * config.max_period)), 0);
  earlier_.assign(std::bit_ceil(at(config.max_period + 1)), 0);
  candidates_.resize(at(config.max_period + 1));
}

const std::optional<Repetition>& RepetitionDetector::feed(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    if (found_) break;
    push(token);
    propose();
    // Without credit they stay due: work per token is bounded, whatever the text.
    while (!found_ && credit_ >= 0 && !due_.empty() && due_.top().first <= position_) {
      const std::int64_t period = due_.top().second;
      due_.pop();
      candidates_[at(period)].due = false;
      count(period);
    }
  }
  return found_;
}

void RepetitionDetector::push(std::int32_t token) {
  // A contiguous history counts faster than a ring. It moves once in history_ tokens.
  if (tokens_.size() == 2 * history_) {
    tokens_.erase(tokens_.begin(), tokens_.end() - static_cast<std::ptrdiff_t>(history_));
  }
  tokens_.push_back(token);
  ++position_;
  credit_ = std::min(credit_ + kCredit, kCredit * static_cast<std::int64_t>(history_));
  hash_ = (hash_ + value_of(token)) * kFactor;
  if (position_ > gram_) hash_ -= value_of(tokens_[tokens_.size() - 1 - at(gram_)]) * leaving_;
}

void RepetitionDetector::propose() {
  if (position_ < gram_) return;
  const auto here = static_cast<std::uint32_t>(position_);
  const std::size_t mask = earlier_.size() - 1;
  // The high bits depend on all tokens of the gram, the low ones hardly.
  std::uint32_t& last = last_[at(static_cast<std::int64_t>((hash_ ^ hash_ >> 29) * kFactor >>
                                                           (64 - std::countr_zero(last_.size()))))];
  std::uint32_t place = last;
  earlier_[here & mask] = place;
  last = here;
  const std::int32_t* newest = tokens_.data() + tokens_.size() - gram_;
  std::int64_t before = 0;
  for (int i = 0; i < kPlaces; ++i) {
    // Differences of low bits: right across their wrap, and whatever is stale is out of range.
    const std::int64_t period = here - place;
    if (period <= before || period > config_.max_period || period > position_ - gram_) return;
    if (std::equal(newest, newest + gram_, newest - period)) consider(period);
    before = period;
    place = earlier_[place & mask];
  }
}

void RepetitionDetector::consider(std::int64_t period) {
  Candidate& candidate = candidates_[at(period)];
  candidate.proposed = position_;
  if (candidate.due) return;
  candidate.due = true;
  due_.emplace(std::max({candidate.not_before, window(period), position_}), period);
}

// Counts the period's window, which ends here, reports it if it holds, and otherwise comes back
// when it could.
void RepetitionDetector::count(std::int64_t period) {
  Candidate& candidate = candidates_[at(period)];
  const std::int64_t pairs = window(period) - period;
  std::int64_t looked_at = 0;
  const bool holds = mismatches(period, allowed(period), looked_at) <= allowed(period);
  credit_ -= looked_at;
  if (holds) {
    report(period);
    return;
  }
  candidate.not_before = position_ + pairs - looked_at + 1;
  if (candidate.proposed > position_ - pairs) {
    candidate.due = true;
    due_.emplace(candidate.not_before, period);
  }
}

void RepetitionDetector::report(std::int64_t period) {
  // Multiples of a period hold too, and one of them may have been counted first.
  for (std::int64_t shorter = 1; shorter < period; ++shorter) {
    std::int64_t looked_at = 0;
    if (window(shorter) <= position_ &&
        mismatches(shorter, allowed(shorter), looked_at) <= allowed(shorter)) {
      period = shorter;
    }
  }
  const std::int64_t pairs = window(period) - period;
  std::int64_t looked_at = 0;
  const std::int64_t wrong = mismatches(period, pairs, looked_at);
  // What the agreement forgives lies at the front where the text before the loop does.
  const auto first = tokens_.end() - static_cast<std::ptrdiff_t>(pairs);
  std::int64_t skipped = 0;
  while (first[skipped] != first[skipped - period]) ++skipped;
  found_ = Repetition{.position = position_,
                      .start = position_ - window(period) + skipped,
                      .period = period,
                      .agreement = 1.0 - static_cast<double>(wrong) / static_cast<double>(pairs)};
}

std::int64_t RepetitionDetector::window(std::int64_t period) const {
  return std::max(config_.min_tokens, config_.min_repeats * period);
}

// Mismatches in a window that still loops.
std::int64_t RepetitionDetector::allowed(std::int64_t period) const {
  const std::int64_t pairs = window(period) - period;
  const double needed = std::ceil(config_.agreement * static_cast<double>(pairs) - 1e-9);
  return pairs - std::max<std::int64_t>(static_cast<std::int64_t>(needed), 1);
}

// From the newest token backwards, until there are more than `bound`, or the window ends.
std::int64_t RepetitionDetector::mismatches(std::int64_t period, std::int64_t bound,
                                            std::int64_t& looked_at) const {
  const std::int64_t pairs = window(period) - period;
  const std::int32_t* end = tokens_.data() + tokens_.size();
  std::int64_t wrong = 0;
  looked_at = 0;
  while (looked_at < pairs && wrong <= bound) {
    const std::int64_t length = std::min(kChunk, pairs - looked_at);
    const std::int32_t* begin = end - looked_at - length;
    std::int32_t differ = 0;
    for (std::int64_t i = 0; i < length; ++i) differ += begin[i] != begin[i - period];
    wrong += differ;
    looked_at += length;
  }
  return wrong;
}

}  // namespace kimisys::rollout
