// Who serves whom. A plan says what must arrive where; several ranks of the source may hold it, and
// several of the destination may want it. A route cuts that into parts and names, for each part and
// each receiver, the rank that sends it: an owner, or a peer that has it before (relay).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <vector>

#include "reshard/cluster.h"

namespace kimisys::reshard {

// A run of a demand's bytes. `turn` is when a reader who goes through the model in order comes by:
// smaller is earlier.
struct Piece {
  std::int64_t turn = 0;
  std::int64_t bytes = 0;

  bool operator==(const Piece&) const = default;
};

// All elements that the same source ranks hold and the same destination ranks want.
struct Demand {
  std::vector<std::int64_t> owners;     // source ranks, ascending
  std::vector<std::int64_t> receivers;  // destination ranks, ascending
  std::vector<Piece> pieces;            // by turn; bytes are those that one receiver gets
  std::int64_t copies = 0;              // for one receiver

  std::int64_t bytes() const;
  bool operator==(const Demand&) const = default;
};

struct RouteOptions {
  double nic_bandwidth = 50e9;                  // bytes per second, each way
  double message_seconds = 5e-6;                // of each message, whatever its size
  std::int64_t chunk = std::int64_t{32} << 20;  // bytes of the largest message
  bool relay = true;                            // false: every receiver is served by an owner
};

// A part of a demand: its bytes [begin, begin + bytes). Its hops, one for each receiver in the
// order of the demand, are those from first_hop on.
struct Part {
  std::uint32_t demand = 0;
  std::int64_t begin = 0;
  std::int64_t bytes = 0;
  std::size_t first_hop = 0;
};

class Route {
 public:
  // Raises PlanError for a demand without owners, with unknown ranks or negative bytes, for options
  // that are not positive, and for more than 2^28 hops or kMaxTotalBytes. The result depends on
  // nothing but the arguments.
  Route(std::shared_ptr<const Cluster> cluster, std::vector<Demand> demands, RouteOptions options);

  const Cluster& cluster() const { return *cluster_; }
  const std::vector<Demand>& demands() const { return demands_; }
  const RouteOptions& options() const { return options_; }
  const std::vector<Part>& parts() const { return parts_; }

  // The hop h brings its part from endpoint server(h) to endpoint receiver(h). Following servers
  // from any hop leads to an owner: no part runs in a circle.
  std::size_t hops() const { return servers_.size(); }
  std::uint32_t server(std::size_t hop) const { return servers_[hop]; }
  std::uint32_t receiver(std::size_t hop) const { return receivers_[hop]; }
  bool local(std::size_t hop) const { return cluster_->same_node(servers_[hop], receivers_[hop]); }

  // Bytes that each NIC sends and receives. Within a node nothing passes a NIC.
  const std::vector<std::int64_t>& egress() const { return egress_; }
  const std::vector<std::int64_t>& ingress() const { return ingress_; }
  std::int64_t local_bytes() const { return local_bytes_; }
  std::int64_t remote_bytes() const { return remote_bytes_; }
  // The share of remote_bytes that peers send.
  std::int64_t relayed_bytes() const { return relayed_bytes_; }

 private:
  friend class Router;
  void count();

  std::shared_ptr<const Cluster> cluster_;
  std::vector<Demand> demands_;
  RouteOptions options_;
  std::vector<Part> parts_;
  std::vector<std::uint32_t> servers_;
  std::vector<std::uint32_t> receivers_;
  std::vector<std::int64_t> egress_;
  std::vector<std::int64_t> ingress_;
  std::int64_t local_bytes_ = 0;
  std::int64_t remote_bytes_ = 0;
  std::int64_t relayed_bytes_ = 0;
};

std::ostream& operator<<(std::ostream& stream, const Demand& demand);
std::ostream& operator<<(std::ostream& stream, const Route& route);

}  // namespace kimisys::reshard
