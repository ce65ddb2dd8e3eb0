// What a plan must bring where, summed: the elements that the same source ranks hold and the same
// destination ranks want are one demand, however many tensors and copies they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "reshard/cluster.h"
#include "reshard/layout.h"
#include "reshard/route.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {

// Sets of ranks as numbers: equal sets have equal numbers. Built by adding ranks in ascending
// order, one at a time; 0 is the empty set.
class RankSets {
 public:
  using Id = std::uint32_t;
  Id add(Id set, std::int64_t rank);  // rank is not lower than the set's highest; that one again
                                      // changes nothing
  Id number(const std::vector<std::int64_t>& ascending);
  std::vector<std::int64_t> ranks(Id set) const;

 private:
  struct Node {
    Id shorter = 0;
    std::int64_t rank = -1;
  };
  struct Hash {
    std::size_t operator()(const std::pair<Id, std::int64_t>& key) const {
      return static_cast<std::size_t>(key.second) * 0x9E3779B97F4A7C15u ^ key.first;
    }
  };
  std::vector<Node> nodes_{Node{}};
  std::unordered_map<std::pair<Id, std::int64_t>, Id, Hash> longer_;
};

// The demands between two layouts, in the order of their first tensor at the destination; turns
// are the tensors in that order. Bytes are those of the destination's dtype. Elements that the
// source does not hold are left out: that a plan exists shows that there are none.
std::vector<Demand> demands_of(const Layout& source, const Layout& destination);

// Sums demands with equal owners and receivers; pieces by turn. Keeps the order of the first.
std::vector<Demand> merge_demands(std::vector<Demand> demands);

// The demands of a symbolic plan: counted once for each group, and once more for each of its
// members. A turn is an instance (by length and text of the label) and the place of the demand's
// first tensor in its block.
std::vector<Demand> demands_of(const SymbolicPlan& plan);

// The ranks of both sides, each where its place says.
std::shared_ptr<const Cluster> cluster_of(const Layout& source, const Layout& destination);
std::shared_ptr<const Cluster> cluster_of(const SymbolicPlan& plan);

}  // namespace kimisys::reshard
