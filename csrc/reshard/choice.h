// Which replica serves which copy: the nearest; among equally near ones, such that the busiest NIC
// has little to send.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "reshard/layout.h"
#include "reshard/plan.h"

namespace kimisys::reshard {

// Bytes that NICs and ranks send, over everything planned so far. Copies within a node count for
// the rank, but not for its NIC.
class Loads {
 public:
  std::size_t nic(const Place& place) { return number({place.node, place.nic}, nics_, nic_bytes); }
  std::size_t rank(const Place& place) { return number({place.rank, 0}, ranks_, rank_bytes); }

  std::vector<std::int64_t> nic_bytes;
  std::vector<std::int64_t> rank_bytes;

 private:
  using Numbers = std::map<std::pair<std::int64_t, std::int64_t>, std::size_t>;
  static std::size_t number(std::pair<std::int64_t, std::int64_t> key, Numbers& numbers,
                            std::vector<std::int64_t>& bytes) {
    const auto [at, is_new] = numbers.emplace(key, bytes.size());
    if (is_new) bytes.push_back(0);
    return at->second;
  }

  Numbers nics_;
  Numbers ranks_;
};

// The places of the ranks of one instance of a plan, by their order among the ranks that have
// buffers on each side.
struct Placement {
  std::vector<Place> source;
  std::vector<Place> destination;
};

// 0 on the same device, 1 on the same node, 2 beyond.
inline int distance(const Place& a, const Place& b) {
  return a.node != b.node ? 2 : static_cast<int>(a.device != b.device);
}

// A step that more than one replica can serve.
struct OpenChoice {
  std::size_t step = 0;
  std::size_t first = 0;  // of the candidates
  std::size_t count = 0;
  std::int64_t bytes = 0;
  bool crosses = false;  // from one node to another: it loads a NIC
  std::size_t chosen = 0;
};

struct Candidate {
  std::size_t fragment = 0;
  std::size_t rank = 0;  // order among the source's ranks
};

// Gives the open choices their candidates: largest first, each to the least busy NIC (then the
// least busy rank, then the first), and then moves and exchanges while the busiest NIC gets less.
// The plan stands for all `instances` at once, each of which sends from its own ranks. Depends on
// nothing but its arguments.
class Chooser {
 public:
  Chooser(const std::vector<Placement>& instances, Loads& loads);

  // Bytes that only this rank can send.
  void add(std::size_t rank, std::int64_t bytes, bool crosses);
  void choose(std::vector<OpenChoice>& choices, const std::vector<Candidate>& candidates);

 private:
  struct Share {
    std::size_t number = 0;      // of a NIC or rank in loads_
    std::int64_t instances = 0;  // that send through it
  };
  using Shares = std::vector<std::vector<Share>>;

  static std::int64_t highest(const std::vector<Share>& shares,
                              const std::vector<std::int64_t>& bytes, std::int64_t more);
  std::pair<std::int64_t, std::int64_t> busy_with(std::size_t rank, const OpenChoice& choice) const;
  bool improve(std::vector<OpenChoice>& choices, const std::vector<Candidate>& candidates);
  bool exchange(std::vector<OpenChoice>& choices, const std::vector<Candidate>& candidates,
                const std::vector<std::size_t>& heavy, std::int64_t limit);

  Loads& loads_;
  Shares nics_;  // by source rank
  Shares ranks_;
};

// The steps that fill `destination` from `source`, for all instances, whose loads are added.
std::vector<Step> make_steps(const Layout& source, const Layout& destination,
                             const std::vector<Placement>& instances, Loads& loads);

}  // namespace kimisys::reshard
