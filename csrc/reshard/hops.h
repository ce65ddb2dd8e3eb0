// What both simulations ask of a route: which hops wait for which, and who is paired with whom.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "reshard/route.h"

namespace kimisys::reshard {

inline constexpr std::uint32_t kNoHop = std::numeric_limits<std::uint32_t>::max();

// For each hop the hop that brings the part to its server; kNoHop where that is an owner.
inline std::vector<std::uint32_t> hop_parents(const Route& route) {
  std::vector<std::uint32_t> parents(route.hops(), kNoHop);
  // The last part that came to each endpoint, and by which hop.
  struct Last {
    std::size_t part = std::numeric_limits<std::size_t>::max();
    std::uint32_t hop = 0;
  };
  std::vector<Last> last(route.cluster().endpoints().size());
  for (std::size_t p = 0; p < route.parts().size(); ++p) {
    const Part& part = route.parts()[p];
    const std::size_t end = part.first_hop + route.demands()[part.demand].receivers.size();
    for (std::size_t hop = part.first_hop; hop < end; ++hop) {
      last[route.receiver(hop)] = {p, static_cast<std::uint32_t>(hop)};
    }
    for (std::size_t hop = part.first_hop; hop < end; ++hop) {
      const Last& it = last[route.server(hop)];
      if (it.part == p) parents[hop] = it.hop;
    }
  }
  return parents;
}

inline std::size_t nic_of(const Route& route, std::uint32_t endpoint) {
  return route.cluster().endpoints()[endpoint].nic;
}

}  // namespace kimisys::reshard
