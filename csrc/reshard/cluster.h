// The ranks of both sides in one cluster: where each runs, and which network card (NIC) it uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "reshard/layout.h"

namespace kimisys::reshard {

// A rank of one side. Source ranks come first, then destination ranks, each ascending.
struct Endpoint {
  bool destination = false;
  Place place;
  std::size_t nic = 0;  // index into Cluster::nics()
};

struct Nic {
  std::int64_t node = 0;
  std::int64_t nic = 0;

  bool operator==(const Nic&) const = default;
};

class Cluster {
 public:
  // One place for each rank that takes part. A NIC is one (node, nic) whichever side uses it, so a
  // source rank and a destination rank may share it. Raises LayoutError for a rank given twice.
  Cluster(std::vector<Place> source, std::vector<Place> destination);

  const std::vector<Endpoint>& endpoints() const { return endpoints_; }
  const std::vector<Nic>& nics() const { return nics_; }  // sorted by (node, nic)

  // The endpoint of a rank. Raises PlanError if that side has no such rank.
  std::uint32_t source(std::int64_t rank) const;
  std::uint32_t destination(std::int64_t rank) const;

  bool same_node(std::uint32_t a, std::uint32_t b) const {
    return endpoints_[a].place.node == endpoints_[b].place.node;
  }
  bool same_device(std::uint32_t a, std::uint32_t b) const {
    return same_node(a, b) && endpoints_[a].place.device == endpoints_[b].place.device;
  }

 private:
  using Index = std::unordered_map<std::int64_t, std::uint32_t>;
  void add(std::vector<Place> places, bool destination, Index& index);

  std::vector<Endpoint> endpoints_;
  std::vector<Nic> nics_;
  Index sources_;
  Index destinations_;
};

}  // namespace kimisys::reshard
