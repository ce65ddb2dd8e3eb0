// The natural order: each receiving NIC pulls part after part, in the order of the model.
#include <algorithm>
#include <deque>
#include <functional>
#include <queue>
#include <tuple>
#include <utility>

#include "reshard/hops.h"
#include "reshard/simulate.h"

namespace kimisys::reshard {
namespace {

// What one hop brings of one piece of its demand.
struct Item {
  std::int64_t turn = 0;
  std::size_t part = 0;
  std::uint32_t slice = 0;  // number of the piece within the part
  std::uint32_t hop = 0;
  std::int64_t bytes = 0;
  auto key() const { return std::tie(turn, part, slice, hop); }
};

class Natural {
 public:
  explicit Natural(const Route& route)
      : route_(route),
        wanted_(route.cluster().nics().size()),
        cursor_(wanted_.size()),
        queues_(wanted_.size()),
        sending_(wanted_.size()),
        arrived_(route.hops()),
        origin_(hop_parents(route)) {}

  // All pull in one order of (turn, part, piece). Of the pulls that wait for a peer, one with the
  // smallest key waits for an owner in the end, since parts do not run in a circle: none is stuck.
  Simulation run() {
    list_items();
    // A hop within a node takes no time: whoever waits for it waits for what brought the part in.
    const std::vector<std::uint32_t> parents = origin_;
    for (std::uint32_t& origin : origin_) {
      while (origin != kNoHop && route_.local(origin)) origin = parents[origin];
    }
    for (std::size_t nic = 0; nic < wanted_.size(); ++nic) waiting_.push_back(nic);
    serve(0);
    while (!running_.empty()) {
      const double now = running_.top().first;
      while (!running_.empty() && running_.top().first == now) {
        const std::size_t message = running_.top().second;
        running_.pop();
        finish(message);
      }
      serve(now);
    }
    return std::move(result_);
  }

 private:
  void list_items() {
    for (std::size_t p = 0; p < route_.parts().size(); ++p) {
      const Part& part = route_.parts()[p];
      const Demand& demand = route_.demands()[part.demand];
      std::int64_t begin = 0;
      std::uint32_t slice = 0;
      for (const Piece& piece : demand.pieces) {
        const std::int64_t from = std::max(begin, part.begin);
        const std::int64_t to = std::min(begin + piece.bytes, part.begin + part.bytes);
        begin += piece.bytes;
        if (to <= from) continue;
        for (std::size_t i = 0; i < demand.receivers.size(); ++i) {
          const auto hop = static_cast<std::uint32_t>(part.first_hop + i);
          if (route_.local(hop)) continue;
          wanted_[nic_of(route_, route_.receiver(hop))].push_back(
              {piece.turn, p, slice, hop, to - from});
        }
        ++slice;
      }
    }
    for (std::vector<Item>& items : wanted_) {
      std::sort(items.begin(), items.end(),
                [](const Item& a, const Item& b) { return a.key() < b.key(); });
    }
  }

  bool available(const Item& item) const {
    return origin_[item.hop] == kNoHop || arrived_[origin_[item.hop]] > item.slice;
  }

  // Those whose next item has come to its sender queue there, in the order of their numbers; then
  // each idle sender turns to the first in its queue.
  void serve(double now) {
    std::sort(waiting_.begin(), waiting_.end());
    std::vector<std::size_t> still;
    std::vector<std::size_t> senders = std::move(freed_);
    for (const std::size_t nic : waiting_) {
      if (cursor_[nic] == wanted_[nic].size()) continue;
      const Item& item = wanted_[nic][cursor_[nic]];
      if (!available(item)) {
        still.push_back(nic);
        continue;
      }
      const std::size_t sender = nic_of(route_, route_.server(item.hop));
      queues_[sender].push_back(nic);
      senders.push_back(sender);
    }
    waiting_ = std::move(still);
    std::sort(senders.begin(), senders.end());
    for (const std::size_t sender : senders) {
      if (sending_[sender] || queues_[sender].empty()) continue;
      start(sender, queues_[sender].front(), now);
      queues_[sender].pop_front();
    }
    freed_.clear();
  }

  void start(std::size_t sender, std::size_t receiver, double now) {
    const std::vector<Item>& items = wanted_[receiver];
    const RouteOptions& options = route_.options();
    const std::uint32_t from = route_.server(items[cursor_[receiver]].hop);
    const std::uint32_t to = route_.receiver(items[cursor_[receiver]].hop);
    Message message{now, 0, from, to, 0, result_.items.size()};
    for (std::size_t& i = cursor_[receiver]; i < items.size(); ++i) {
      const Item& item = items[i];
      const bool fits = message.bytes + item.bytes <= options.chunk && available(item) &&
                        route_.server(item.hop) == from && route_.receiver(item.hop) == to;
      if (!fits) break;
      message.bytes += item.bytes;
      result_.items.push_back(item.hop);
    }
    sending_[sender] = true;
    message.end =
        now + options.message_seconds + static_cast<double>(message.bytes) / options.nic_bandwidth;
    running_.emplace(message.end, result_.messages.size());
    result_.messages.push_back(message);
  }

  void finish(std::size_t number) {
    const Message& message = result_.messages[number];
    const std::size_t last = number + 1 < result_.messages.size()
                                 ? result_.messages[number + 1].first_item
                                 : result_.items.size();
    for (std::size_t i = message.first_item; i < last; ++i) ++arrived_[result_.items[i]];
    const std::size_t sender = nic_of(route_, message.sender);
    sending_[sender] = false;
    freed_.push_back(sender);
    waiting_.push_back(nic_of(route_, message.receiver));
  }

  const Route& route_;
  std::vector<std::vector<Item>> wanted_;        // per receiving NIC, in its order
  std::vector<std::size_t> cursor_;              // how far it has come
  std::vector<std::deque<std::size_t>> queues_;  // per sending NIC: who waits there
  std::vector<bool> sending_;
  std::vector<std::uint32_t> arrived_;  // slices per hop
  std::vector<std::uint32_t> origin_;   // the remote hop that brings the part to the hop's server
  std::vector<std::size_t> waiting_;    // receiving NICs that are in no queue and get nothing
  std::vector<std::size_t> freed_;
  using Running = std::pair<double, std::size_t>;
  std::priority_queue<Running, std::vector<Running>, std::greater<>> running_;
  Simulation result_;
};

}  // namespace

Simulation simulate_natural(const Route& route) { return Natural(route).run(); }

}  // namespace kimisys::reshard
