#include "reshard/router.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

namespace kimisys::reshard {
namespace {

std::int64_t most(const std::vector<std::int64_t>& loads) {
  return loads.empty() ? 0 : *std::max_element(loads.begin(), loads.end());
}

}  // namespace

void Router::run() {
  std::fill(servers_.begin(), servers_.end(), kNobody);
  std::vector<Geometry> open;
  // First what leaves no choice, so that the choices know about it; then the largest demands.
  for (std::size_t p = 0; p < parts_.size();) {
    Geometry shape = geometry(p);
    p = shape.last_part;
    serve_locally(shape);
    if (shape.groups.empty()) continue;
    const std::int64_t bytes = demands_[parts_[shape.first_part].demand].bytes();
    if (shape.one_sender && options_.relay) egress_[nic(shape.holders.front())] += bytes;
    if (shape.one_entry) choose_entries(shape);
    if (shape.one_sender && shape.one_entry && shape.groups.size() == 1) {
      if (!options_.relay) egress_[nic(shape.holders.front())] += bytes;
      for (std::size_t i = shape.first_part; i < shape.last_part; ++i) {
        servers_[parts_[i].first_hop + shape.groups.front().front()] = shape.holders.front();
      }
      continue;
    }
    open.push_back(std::move(shape));
  }
  const auto size = [&](const Geometry& shape) {
    const Demand& demand = demands_[parts_[shape.first_part].demand];
    return demand.bytes() * static_cast<std::int64_t>(demand.receivers.size());
  };
  std::stable_sort(open.begin(), open.end(),
                   [&](const Geometry& a, const Geometry& b) { return size(a) > size(b); });
  for (const Geometry& shape : open) {
    if (!shape.one_entry) choose_entries(shape);
  }
  limit_ = relay_limit();
  for (const Geometry& shape : open) serve(shape);
  if (!open.empty()) improve();
}

// How much a NIC may send before a peer takes over. Below three quarters of the time that is needed
// in any case, a copy from the owner costs nothing, and it needs not wait for another one.
std::int64_t Router::relay_limit() const {
  if (!options_.relay) return 0;
  std::int64_t sum = 0;
  for (const std::int64_t bytes : ingress_) sum += bytes;
  const auto nics = static_cast<std::int64_t>(std::max<std::size_t>(ingress_.size(), 1));
  return std::max(most(ingress_), sum / nics) / 4 * 3;
}

Router::Geometry Router::geometry(std::size_t first_part) const {
  const Demand& demand = demands_[parts_[first_part].demand];
  Geometry shape;
  shape.first_part = shape.last_part = first_part;
  while (shape.last_part < parts_.size() &&
         parts_[shape.last_part].demand == parts_[first_part].demand) {
    ++shape.last_part;
  }
  for (const std::int64_t rank : demand.owners) shape.holders.push_back(cluster_.source(rank));
  shape.owners = shape.holders.size();
  std::map<std::int64_t, Group> nodes;
  const std::uint32_t* receivers = &receivers_[parts_[first_part].first_hop];
  for (std::size_t i = 0; i < demand.receivers.size(); ++i) {
    nodes[cluster_.endpoints()[receivers[i]].place.node].push_back(i);
  }
  for (auto& [node, members] : nodes) {
    const bool held = std::any_of(
        shape.holders.begin(), shape.holders.begin() + static_cast<std::ptrdiff_t>(shape.owners),
        [&](std::uint32_t owner) { return cluster_.endpoints()[owner].place.node == node; });
    if (!held) {
      add_group(shape, std::move(members));
    } else if (options_.relay) {
      for (const std::size_t member : members) shape.holders.push_back(receivers[member]);
    }
  }
  const auto same_nic = [&](std::uint32_t a, std::uint32_t b) { return nic(a) == nic(b); };
  const auto all_same = [&](const auto& list, const auto& same) {
    return std::adjacent_find(list.begin(), list.end(),
                              [&](auto a, auto b) { return !same(a, b); }) == list.end();
  };
  shape.one_sender = all_same(shape.holders, same_nic);
  shape.one_entry = std::all_of(shape.groups.begin(), shape.groups.end(), [&](const Group& group) {
    return all_same(
        group, [&](std::size_t a, std::size_t b) { return same_nic(receivers[a], receivers[b]); });
  });
  return shape;
}

// Without relay no receiver serves another, not even on its node: each takes in its own.
void Router::add_group(Geometry& shape, Group members) const {
  if (options_.relay) {
    shape.groups.push_back(std::move(members));
    return;
  }
  for (const std::size_t member : members) shape.groups.push_back({member});
}

// Receivers that share a node with an owner: from the same device if there is one.
void Router::serve_locally(const Geometry& shape) {
  const std::size_t first_hop = parts_[shape.first_part].first_hop;
  const std::size_t count = demands_[parts_[shape.first_part].demand].receivers.size();
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t receiver = receivers_[first_hop + i];
    std::uint32_t server = kNobody;
    for (std::size_t o = shape.owners; o-- > 0;) {
      const std::uint32_t owner = shape.holders[o];
      if (!cluster_.same_node(owner, receiver)) continue;
      const bool better = server == kNobody || cluster_.same_device(owner, receiver) ||
                          !cluster_.same_device(server, receiver);
      if (better) server = owner;
    }
    if (server == kNobody) continue;
    for (std::size_t p = shape.first_part; p < shape.last_part; ++p) {
      servers_[parts_[p].first_hop + i] = server;
    }
  }
}

// Which member of each group takes a part in: the one whose NIC receives least so far. The others
// get it from that one; its own server stays open.
void Router::choose_entries(const Geometry& shape) {
  for (std::size_t p = shape.first_part; p < shape.last_part; ++p) {
    const std::size_t hop = parts_[p].first_hop;
    for (const Group& group : shape.groups) {
      std::size_t entry = group.front();
      for (const std::size_t member : group) {
        if (ingress_[nic(receivers_[hop + member])] < ingress_[nic(receivers_[hop + entry])]) {
          entry = member;
        }
      }
      ingress_[nic(receivers_[hop + entry])] += parts_[p].bytes;
      for (const std::size_t member : group) {
        if (member != entry) servers_[hop + member] = receivers_[hop + entry];
      }
    }
  }
}

// A part comes to the k-th of a chain after k times its own time at best: counted like load, so
// that only demands of few parts avoid long chains.
std::size_t Router::cheapest(const std::vector<Holder>& holders, std::size_t owners,
                             std::int64_t bytes) const {
  const auto cost = [&](std::size_t i) {
    const std::int64_t load = egress_[nic(holders[i].endpoint)] + bytes;
    const std::int64_t arrival = (holders[i].depth + 1) * bytes;
    return std::make_tuple(std::max({load, arrival, limit_}), i >= owners, load);
  };
  std::size_t best = 0;
  auto best_cost = cost(0);
  for (std::size_t i = 1; i < holders.size(); ++i) {
    const auto its_cost = cost(i);
    if (its_cost < best_cost) std::tie(best, best_cost) = std::make_pair(i, its_cost);
  }
  return best;
}

// The receiver whose NIC sends least is served first: it can serve the others. Of those that send
// alike, the one that receives least can have it first.
void Router::serve(const Geometry& shape) {
  std::vector<std::pair<std::size_t, const Group*>> entries;
  std::vector<Holder> holders;
  for (const std::uint32_t holder : shape.holders) holders.push_back({holder, 0});
  for (std::size_t p = shape.first_part; p < shape.last_part; ++p) {
    const Part& part = parts_[p];
    entries.clear();
    for (const Group& group : shape.groups) {
      const auto open = std::find_if(group.begin(), group.end(), [&](std::size_t member) {
        return servers_[part.first_hop + member] == kNobody;
      });
      entries.emplace_back(part.first_hop + *open, &group);
    }
    const auto busy = [&](std::size_t hop) {
      return std::pair(egress_[nic(receivers_[hop])], ingress_[nic(receivers_[hop])]);
    };
    std::stable_sort(entries.begin(), entries.end(),
                     [&](const auto& a, const auto& b) { return busy(a.first) < busy(b.first); });
    holders.resize(shape.holders.size());
    bool paid = shape.one_sender && options_.relay;  // run() has counted the first copy
    for (const auto& [hop, group] : entries) {
      const std::size_t best = paid ? 0 : cheapest(holders, shape.owners, part.bytes);
      const Holder server = holders[best];
      servers_[hop] = server.endpoint;
      if (!paid) egress_[nic(server.endpoint)] += part.bytes;
      paid = false;
      if (!options_.relay) continue;
      for (const std::size_t member : *group) {
        holders.push_back({receivers_[part.first_hop + member], server.depth + 1});
      }
    }
  }
}

}  // namespace kimisys::reshard
