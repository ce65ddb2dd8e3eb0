#include "reshard/simulate.h"

#include <algorithm>
#include <ostream>

#include "base/error.h"

namespace kimisys::reshard {
namespace {

// The largest sum of `window` consecutive messages, for each endpoint and direction.
void count_staging(const Route& route, std::size_t window, Simulation& result) {
  const std::size_t endpoints = route.cluster().endpoints().size();
  struct Direction {
    std::vector<std::int64_t> last;
    std::size_t next = 0;
    std::int64_t sum = 0;
    std::int64_t peak = 0;
  };
  std::vector<Direction> directions(2 * endpoints);
  for (const Message& message : result.messages) {
    for (const std::size_t end :
         {2 * std::size_t{message.sender}, 2 * std::size_t{message.receiver} + 1}) {
      Direction& it = directions[end];
      if (it.last.size() < window) {
        it.last.push_back(0);
        it.next = it.last.size() - 1;
      }
      it.sum += message.bytes - it.last[it.next];
      it.last[it.next] = message.bytes;
      it.next = (it.next + 1) % window;
      it.peak = std::max(it.peak, it.sum);
    }
  }
  result.staging_bytes.resize(endpoints);
  for (std::size_t e = 0; e < endpoints; ++e) {
    result.staging_bytes[e] = directions[2 * e].peak + directions[2 * e + 1].peak;
  }
}

void count_busy(const Route& route, Simulation& result) {
  const std::vector<Endpoint>& endpoints = route.cluster().endpoints();
  result.send_seconds.assign(route.cluster().nics().size(), 0);
  result.receive_seconds.assign(route.cluster().nics().size(), 0);
  for (const Message& message : result.messages) {
    result.seconds = std::max(result.seconds, message.end);
    result.send_seconds[endpoints[message.sender].nic] += message.end - message.start;
    result.receive_seconds[endpoints[message.receiver].nic] += message.end - message.start;
  }
}

}  // namespace

Simulation simulate(const Route& route, Order order, std::int64_t window) {
  KIMISYS_CHECK(window > 0, ErrorCode::kPlan, "the window is ", window,
                " messages in flight; give a positive number");
  Simulation result = order == Order::kPlanned ? simulate_planned(route) : simulate_natural(route);
  count_busy(route, result);
  count_staging(route, static_cast<std::size_t>(window), result);
  return result;
}

std::ostream& operator<<(std::ostream& stream, const Simulation& simulation) {
  const auto most = [](const auto& list) {
    return list.empty() ? 0 : *std::max_element(list.begin(), list.end());
  };
  return stream << "Simulation(" << simulation.seconds << " s, " << simulation.messages.size()
                << " messages; a NIC is busy for at most " << most(simulation.send_seconds)
                << " s sending and " << most(simulation.receive_seconds)
                << " s receiving; staging at most " << most(simulation.staging_bytes)
                << " bytes on a rank)";
}

}  // namespace kimisys::reshard
