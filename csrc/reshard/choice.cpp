#include "reshard/choice.h"

#include <algorithm>
#include <numeric>

namespace kimisys::reshard {
namespace {

// A round of the search looks at this many choices of the busiest NIC at most, and so many rounds:
// LPT leaves little to gain, and planning must stay linear.
constexpr std::size_t kLookedAt = 64;
constexpr std::size_t kRounds = 256;

}  // namespace

Chooser::Chooser(const std::vector<Placement>& instances, Loads& loads) : loads_(loads) {
  if (instances.empty()) return;
  const std::size_t count = instances.front().source.size();
  nics_.resize(count);
  ranks_.resize(count);
  const auto count_in = [](std::vector<Share>& shares, std::size_t number) {
    const auto at = std::ranges::find(shares, number, &Share::number);
    if (at == shares.end()) {
      shares.push_back({number, 1});
    } else {
      ++at->instances;
    }
  };
  for (const Placement& placement : instances) {
    for (std::size_t rank = 0; rank < count; ++rank) {
      count_in(nics_[rank], loads_.nic(placement.source[rank]));
      count_in(ranks_[rank], loads_.rank(placement.source[rank]));
    }
  }
}

void Chooser::add(std::size_t rank, std::int64_t bytes, bool crosses) {
  for (const Share& share : ranks_[rank]) {
    loads_.rank_bytes[share.number] += bytes * share.instances;
  }
  if (!crosses) return;
  for (const Share& share : nics_[rank]) {
    loads_.nic_bytes[share.number] += bytes * share.instances;
  }
}

std::int64_t Chooser::highest(const std::vector<Share>& shares,
                              const std::vector<std::int64_t>& bytes, std::int64_t more) {
  std::int64_t most = 0;
  for (const Share& share : shares) {
    most = std::max(most, bytes[share.number] + more * share.instances);
  }
  return most;
}

std::pair<std::int64_t, std::int64_t> Chooser::busy_with(std::size_t rank,
                                                         const OpenChoice& choice) const {
  return {choice.crosses ? highest(nics_[rank], loads_.nic_bytes, choice.bytes) : 0,
          highest(ranks_[rank], loads_.rank_bytes, choice.bytes)};
}

void Chooser::choose(std::vector<OpenChoice>& choices, const std::vector<Candidate>& candidates) {
  std::vector<std::size_t> order(choices.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater(), [&](std::size_t i) { return choices[i].bytes; });
  for (const std::size_t i : order) {
    OpenChoice& choice = choices[i];
    auto least = busy_with(candidates[choice.first].rank, choice);
    choice.chosen = choice.first;
    for (std::size_t c = choice.first + 1; c < choice.first + choice.count; ++c) {
      if (const auto busy = busy_with(candidates[c].rank, choice); busy < least) {
        least = busy;
        choice.chosen = c;
      }
    }
    add(candidates[choice.chosen].rank, choice.bytes, choice.crosses);
  }
  for (std::size_t round = 0; round < kRounds && improve(choices, candidates); ++round) {
  }
}

bool Chooser::improve(std::vector<OpenChoice>& choices, const std::vector<Candidate>& candidates) {
  const auto busiest = std::ranges::max_element(loads_.nic_bytes);
  if (busiest == loads_.nic_bytes.end() || *busiest == 0) return false;
  const auto nic = static_cast<std::size_t>(busiest - loads_.nic_bytes.begin());
  const std::int64_t limit = *busiest;
  std::vector<std::size_t> heavy;
  for (std::size_t i = 0; i < choices.size() && heavy.size() < kLookedAt; ++i) {
    const auto& shares = nics_[candidates[choices[i].chosen].rank];
    if (choices[i].crosses && std::ranges::find(shares, nic, &Share::number) != shares.end()) {
      heavy.push_back(i);
    }
  }
  for (const std::size_t i : heavy) {
    OpenChoice& choice = choices[i];
    const std::size_t old = choice.chosen;
    add(candidates[old].rank, -choice.bytes, true);
    for (std::size_t c = choice.first; c < choice.first + choice.count; ++c) {
      const auto& shares = nics_[candidates[c].rank];
      if (std::ranges::find(shares, nic, &Share::number) != shares.end()) continue;
      if (busy_with(candidates[c].rank, choice).first >= limit) continue;
      choice.chosen = c;
      add(candidates[c].rank, choice.bytes, true);
      return true;
    }
    add(candidates[old].rank, choice.bytes, true);
  }
  return exchange(choices, candidates, heavy, limit);
}

bool Chooser::exchange(std::vector<OpenChoice>& choices, const std::vector<Candidate>& candidates,
                       const std::vector<std::size_t>& heavy, std::int64_t limit) {
  const auto place_of = [&](const OpenChoice& choice, std::size_t rank) {
    std::size_t c = choice.first;
    while (c < choice.first + choice.count && candidates[c].rank != rank) ++c;
    return c;
  };
  for (const std::size_t i : heavy) {
    OpenChoice& large = choices[i];
    const std::size_t from = candidates[large.chosen].rank;
    std::size_t looked_at = 0;
    for (OpenChoice& small : choices) {
      if (!small.crosses || small.bytes >= large.bytes) continue;
      const std::size_t to = candidates[small.chosen].rank;
      const std::size_t large_there = place_of(large, to);
      const std::size_t small_here = place_of(small, from);
      if (to == from || large_there == large.first + large.count ||
          small_here == small.first + small.count) {
        continue;
      }
      if (++looked_at > kLookedAt) break;
      const std::int64_t moved = large.bytes - small.bytes;
      add(from, -moved, true);
      add(to, moved, true);
      if (highest(nics_[from], loads_.nic_bytes, 0) < limit &&
          highest(nics_[to], loads_.nic_bytes, 0) < limit) {
        large.chosen = large_there;
        small.chosen = small_here;
        return true;
      }
      add(from, moved, true);
      add(to, -moved, true);
    }
  }
  return false;
}

}  // namespace kimisys::reshard
