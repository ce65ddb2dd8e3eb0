// The time model of a route: how long it takes when every NIC sends one message at a time and
// receives one at a time, and every message costs a fixed time beside that of its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <vector>

#include "reshard/route.h"

namespace kimisys::reshard {

// kPlanned: whenever ends of NICs come free, the free ends are ranked by the bytes that they have
// left (ties: sending ends first, then the lower NIC). The first of them takes the first of those
// free ends that it has something ready for, then the next, until nothing more can start. What a
// peer waits for to pass on goes first in its message.
// kNatural: each receiving NIC pulls part after part in the order of the model and waits for each;
// senders serve who came first (ties: the lower receiving NIC).
enum class Order { kPlanned, kNatural };

// Up to a chunk of bytes from one rank to one other; what is packed together arrives together.
struct Message {
  double start = 0;
  double end = 0;
  std::uint32_t sender = 0;  // endpoints of the route's cluster
  std::uint32_t receiver = 0;
  std::int64_t bytes = 0;
  std::size_t first_item = 0;  // index into Simulation::items
};

struct Simulation {
  double seconds = 0;
  std::vector<double> send_seconds;  // per NIC: how long it was busy
  std::vector<double> receive_seconds;
  std::vector<std::int64_t> staging_bytes;  // per endpoint: most bytes packed or not yet unpacked
  std::vector<Message> messages;            // as they start
  std::vector<std::uint32_t> items;         // the hops that each message carries. A hop whose bytes
                                            // need several messages is listed by each of them.
};

// `window`: messages in flight per rank and direction, each with its own staging buffer; they bound
// the staging memory, while the wire carries one at a time. Raises PlanError if it is not positive.
Simulation simulate(const Route& route, Order order, std::int64_t window = 2);

// The parts of simulate().
Simulation simulate_planned(const Route& route);
Simulation simulate_natural(const Route& route);

std::ostream& operator<<(std::ostream& stream, const Simulation& simulation);

}  // namespace kimisys::reshard
