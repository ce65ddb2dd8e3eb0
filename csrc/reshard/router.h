// The choice behind a Route: servers for all hops, so that the most loaded NIC has little to do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "reshard/route.h"

namespace kimisys::reshard {

class Router {
 public:
  // Fills `servers`, one for each hop; the other arguments are as in Route and outlive the Router.
  Router(const Cluster& cluster, const std::vector<Demand>& demands, const RouteOptions& options,
         const std::vector<Part>& parts, const std::vector<std::uint32_t>& receivers,
         std::vector<std::uint32_t>& servers)
      : cluster_(cluster),
        demands_(demands),
        options_(options),
        parts_(parts),
        receivers_(receivers),
        servers_(servers),
        egress_(cluster.nics().size()),
        ingress_(cluster.nics().size()) {}

  // The receivers of one demand on one node that holds nothing of it before: one of them takes it
  // in and serves the others. Members are positions in the demand's receivers.
  using Group = std::vector<std::size_t>;

  // A demand seen from the network.
  struct Geometry {
    std::size_t first_part = 0;
    std::size_t last_part = 0;
    std::vector<std::uint32_t> holders;  // owners, then receivers that an owner's node serves
    std::size_t owners = 0;              // how many of the holders are owners
    std::vector<Group> groups;
    bool one_sender = false;  // all holders send through one NIC
    bool one_entry = false;   // all groups have one NIC each
  };

  void run();

  // One that can send a part, after so many hops between nodes.
  struct Holder {
    std::uint32_t endpoint = 0;
    std::int64_t depth = 0;
  };

 private:
  static constexpr std::uint32_t kNobody = std::numeric_limits<std::uint32_t>::max();

  Geometry geometry(std::size_t first_part) const;
  void add_group(Geometry& shape, Group members) const;
  void serve_locally(const Geometry& shape);
  void choose_entries(const Geometry& shape);
  void serve(const Geometry& shape);
  std::size_t cheapest(const std::vector<Holder>& holders, std::size_t owners,
                       std::int64_t bytes) const;
  std::int64_t relay_limit() const;

  void improve();
  bool relieve(bool sending, std::size_t nic);
  bool try_sender(std::size_t hop, const Part& part, const Geometry& shape);
  bool try_entry(std::size_t hop, const Part& part, const Geometry& shape);
  bool comes_through(const Part& part, std::size_t hop, std::size_t through) const;
  const Geometry& cached(const Part& part);
  void list_hops();

  std::size_t nic(std::uint32_t endpoint) const { return cluster_.endpoints()[endpoint].nic; }
  bool remote(std::size_t hop) const { return !cluster_.same_node(servers_[hop], receivers_[hop]); }

  const Cluster& cluster_;
  const std::vector<Demand>& demands_;
  const RouteOptions& options_;
  const std::vector<Part>& parts_;
  const std::vector<std::uint32_t>& receivers_;
  std::vector<std::uint32_t>& servers_;
  std::vector<std::int64_t> egress_;
  std::vector<std::int64_t> ingress_;
  std::int64_t limit_ = 0;

  // The local search's: remote hops by the NIC that sent or received them when they were listed,
  // the number of hops that it may still look at, and the demand that it looked at last.
  std::vector<std::vector<std::size_t>> sent_;
  std::vector<std::vector<std::size_t>> received_;
  std::int64_t budget_ = 0;
  Geometry cache_;
  std::size_t cached_demand_ = kNobody;
};

}  // namespace kimisys::reshard
