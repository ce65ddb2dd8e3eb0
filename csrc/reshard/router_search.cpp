// The router's local search: while the most loaded NIC can pass on one part, it does.
#include <algorithm>
#include <utility>

#include "reshard/router.h"

namespace kimisys::reshard {

void Router::improve() {
  budget_ = 200'000 + static_cast<std::int64_t>(servers_.size());
  while (budget_ > 0) {
    const auto out = std::max_element(egress_.begin(), egress_.end());
    const auto in = std::max_element(ingress_.begin(), ingress_.end());
    const bool sending = *out > *in;
    const auto nic = sending ? out - egress_.begin() : in - ingress_.begin();
    if (!relieve(sending, static_cast<std::size_t>(nic))) return;
  }
}

void Router::list_hops() {
  sent_.resize(egress_.size());
  received_.resize(ingress_.size());
  for (std::size_t hop = 0; hop < servers_.size(); ++hop) {
    if (!remote(hop)) continue;
    sent_[nic(servers_[hop])].push_back(hop);
    received_[nic(receivers_[hop])].push_back(hop);
  }
}

bool Router::relieve(bool sending, std::size_t nic_number) {
  if (sent_.empty()) list_hops();
  std::vector<std::size_t>& list = sending ? sent_[nic_number] : received_[nic_number];
  for (std::size_t i = list.size(); i-- > 0 && budget_ > 0; --budget_) {
    const std::size_t hop = list[i];
    // Listed when it was remote and this NIC's: an earlier move may have changed either.
    const std::uint32_t end = sending ? servers_[hop] : receivers_[hop];
    if (!remote(hop) || nic(end) != nic_number) continue;
    const auto after = std::upper_bound(
        parts_.begin(), parts_.end(), hop,
        [](std::size_t number, const Part& part) { return number < part.first_hop; });
    const Part& part = *std::prev(after);
    const Geometry& shape = cached(part);
    if (sending ? try_sender(hop, part, shape) : try_entry(hop, part, shape)) return true;
  }
  return false;
}

const Router::Geometry& Router::cached(const Part& part) {
  if (cached_demand_ != part.demand) {
    const auto first = std::lower_bound(
        parts_.begin(), parts_.end(), part.demand,
        [](const Part& other, std::uint32_t demand) { return other.demand < demand; });
    cache_ = geometry(static_cast<std::size_t>(first - parts_.begin()));
    cached_demand_ = part.demand;
  }
  return cache_;
}

// Whether the receiver of `hop` gets its part through the hop `through`, itself included.
bool Router::comes_through(const Part& part, std::size_t hop, std::size_t through) const {
  const auto first = receivers_.begin() + static_cast<std::ptrdiff_t>(part.first_hop);
  const auto last = first + static_cast<std::ptrdiff_t>(demands_[part.demand].receivers.size());
  while (hop != through) {
    if (!cluster_.endpoints()[servers_[hop]].destination) return false;
    hop =
        static_cast<std::size_t>(std::lower_bound(first, last, servers_[hop]) - receivers_.begin());
  }
  return true;
}

bool Router::try_sender(std::size_t hop, const Part& part, const Geometry& shape) {
  const std::size_t from = nic(servers_[hop]);
  std::uint32_t best = servers_[hop];
  std::int64_t least = egress_[from] - part.bytes;
  const auto consider = [&](std::uint32_t endpoint) {
    if (egress_[nic(endpoint)] >= least || cluster_.same_node(endpoint, receivers_[hop])) return;
    best = endpoint;
    least = egress_[nic(endpoint)];
  };
  for (const std::uint32_t holder : shape.holders) consider(holder);
  if (options_.relay) {
    const std::size_t end = part.first_hop + demands_[part.demand].receivers.size();
    for (std::size_t other = part.first_hop; other < end; ++other) {
      if (egress_[nic(receivers_[other])] >= least || comes_through(part, other, hop)) continue;
      consider(receivers_[other]);
    }
  }
  if (best == servers_[hop]) return false;
  egress_[from] -= part.bytes;
  egress_[nic(best)] += part.bytes;
  servers_[hop] = best;
  sent_[nic(best)].push_back(hop);
  return true;
}

// Another member of the receiver's group takes the part in and serves the rest of the group.
bool Router::try_entry(std::size_t hop, const Part& part, const Geometry& shape) {
  const std::size_t entry = hop - part.first_hop;
  const auto group =
      std::find_if(shape.groups.begin(), shape.groups.end(), [&](const Group& members) {
        return std::find(members.begin(), members.end(), entry) != members.end();
      });
  if (group == shape.groups.end()) return false;
  const std::size_t from = nic(receivers_[hop]);
  std::size_t best = entry;
  std::int64_t least = ingress_[from] - part.bytes;
  for (const std::size_t member : *group) {
    const std::int64_t load = ingress_[nic(receivers_[part.first_hop + member])];
    if (load < least) std::tie(best, least) = std::make_pair(member, load);
  }
  if (best == entry) return false;
  const std::size_t other = part.first_hop + best;
  ingress_[from] -= part.bytes;
  ingress_[nic(receivers_[other])] += part.bytes;
  servers_[other] = servers_[hop];
  for (const std::size_t member : *group) {
    if (member != best) servers_[part.first_hop + member] = receivers_[other];
  }
  received_[nic(receivers_[other])].push_back(other);
  // The same server now sends another hop of the part: it keeps its place among those it sends.
  sent_[nic(servers_[other])].push_back(other);
  return true;
}

}  // namespace kimisys::reshard
