// The planned order: at each moment the NICs that have most left are served first.
#include <algorithm>
#include <functional>
#include <queue>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "reshard/hops.h"
#include "reshard/simulate.h"

namespace kimisys::reshard {
namespace {

// A pair that has something ready, and its other end.
struct Link {
  std::uint32_t pair = 0;
  std::uint32_t partner = 0;
};

// One NIC's sending or receiving half. Numbers: senders 0..n-1, receivers n..2n-1.
struct End {
  std::int64_t left = 0;  // bytes that it has not yet begun
  std::vector<Link> active;
  bool touched = false;  // came free, or got something to do, since the last match
  bool listed = false;   // match looks at it
  bool open = false;     // touched, and some pair could use it
};

constexpr std::int64_t kBusy = -1;
constexpr std::size_t kFew = 16;

struct Pair {
  std::uint32_t sender = 0;  // endpoints
  std::uint32_t receiver = 0;
  std::uint32_t ends[2] = {0, 0};            // the NICs' sending and receiving half
  std::size_t position[2] = {0, 0};          // in the ends' active lists
  std::uint32_t head[2] = {kNoHop, kNoHop};  // ready hops: others wait for the first list's
  std::uint32_t tail[2] = {kNoHop, kNoHop};
  bool ready() const { return head[0] != kNoHop || head[1] != kNoHop; }
};

class Planned {
 public:
  explicit Planned(const Route& route)
      : route_(route),
        nics_(route.cluster().nics().size()),
        ends_(2 * nics_),
        free_(2 * nics_, 0),
        bytes_(route.hops()),
        pair_of_(route.hops(), kNoHop),
        next_(route.hops(), kNoHop),
        child_(route.hops(), kNoHop),
        sibling_(route.hops(), kNoHop) {}

  Simulation run() {
    const std::vector<std::uint32_t> parents = hop_parents(route_);
    number_pairs();
    for (std::size_t hop = parents.size(); hop-- > 0;) {
      if (parents[hop] == kNoHop) continue;
      sibling_[hop] = child_[parents[hop]];
      child_[parents[hop]] = static_cast<std::uint32_t>(hop);
    }
    for (std::size_t hop = 0; hop < parents.size(); ++hop) {
      if (parents[hop] == kNoHop) begin(static_cast<std::uint32_t>(hop));
    }
    for (std::size_t e = 0; e < ends_.size(); ++e) free_[e] = ends_[e].left;
    match(0);
    while (!running_.empty()) {
      const double now = running_.top().first;
      while (!running_.empty() && running_.top().first == now) {
        const std::size_t message = running_.top().second;
        running_.pop();
        finish(message);
      }
      match(now);
    }
    return std::move(result_);
  }

 private:
  void number_pairs() {
    std::unordered_map<std::uint64_t, std::uint32_t> numbers;
    for (const Part& part : route_.parts()) {
      const std::size_t end = part.first_hop + route_.demands()[part.demand].receivers.size();
      for (std::size_t hop = part.first_hop; hop < end; ++hop) {
        bytes_[hop] = part.bytes;
        if (route_.local(hop)) continue;
        const std::uint32_t sender = route_.server(hop);
        const std::uint32_t receiver = route_.receiver(hop);
        const auto [it, added] = numbers.try_emplace(std::uint64_t{sender} << 32 | receiver,
                                                     static_cast<std::uint32_t>(pairs_.size()));
        if (added) {
          Pair pair;
          pair.sender = sender;
          pair.receiver = receiver;
          pair.ends[0] = static_cast<std::uint32_t>(nic_of(route_, sender));
          pair.ends[1] = static_cast<std::uint32_t>(nics_ + nic_of(route_, receiver));
          pairs_.push_back(pair);
        }
        pair_of_[hop] = it->second;
        for (const std::size_t e : pairs_[it->second].ends) ends_[e].left += part.bytes;
      }
    }
  }

  // The server of the hop has its part now. Within a node it arrives in no time.
  void begin(std::uint32_t hop) {
    if (route_.local(hop)) {
      arrive(hop);
      return;
    }
    Pair& pair = pairs_[pair_of_[hop]];
    if (!pair.ready()) activate(pair_of_[hop]);
    const std::size_t list = child_[hop] == kNoHop ? 1 : 0;
    (pair.head[list] == kNoHop ? pair.head[list] : next_[pair.tail[list]]) = hop;
    pair.tail[list] = hop;
    touch(pair.ends[1]);
  }

  void arrive(std::uint32_t hop) {
    for (std::uint32_t c = child_[hop]; c != kNoHop; c = sibling_[c]) begin(c);
  }

  void activate(std::uint32_t number) {
    Pair& pair = pairs_[number];
    for (const std::size_t side : {0, 1}) {
      std::vector<Link>& active = ends_[pair.ends[side]].active;
      pair.position[side] = active.size();
      active.push_back({number, pair.ends[1 - side]});
    }
  }

  void deactivate(std::uint32_t number) {
    const Pair& pair = pairs_[number];
    for (const std::size_t side : {0, 1}) {
      std::vector<Link>& active = ends_[pair.ends[side]].active;
      pairs_[active.back().pair].position[side] = pair.position[side];
      active[pair.position[side]] = active.back();
      active.pop_back();
    }
  }

  void touch(std::size_t end) {
    if (ends_[end].touched) return;
    ends_[end].touched = true;
    touched_.push_back(end);
  }

  bool outranks(std::size_t a, std::size_t b) const {
    return ends_[a].left != ends_[b].left ? ends_[a].left > ends_[b].left : a < b;
  }

  // The end's pair with the highest-ranked free partner; kNoHop if there is none.
  std::uint32_t best_of(std::size_t end) const {
    if (free_[end] == kBusy) return kNoHop;
    Link best{kNoHop, 0};
    std::int64_t most = kBusy;
    for (const Link link : ends_[end].active) {
      const std::int64_t left = free_[link.partner];
      if (left < most || left == kBusy) continue;
      const bool ahead = left > most || link.partner < best.partner ||
                         (link.partner == best.partner && link.pair < best.pair);
      if (ahead) std::tie(best, most) = std::make_pair(link, left);
    }
    return best.pair;
  }

  // Every pair that can start now has a touched end: one that came free or got something to do. The
  // highest-ranked end of all those pairs takes its best partner, then the next.
  void match(double now) {
    if (touched_.size() <= kFew) {
      match_few(now);
    } else {
      match_many(now);
    }
    touched_.clear();
  }

  // Mostly one or two ends are touched, and a hundred idle ones could serve them: only the touched
  // ends' best pairs are looked for, again whenever a partner has started meanwhile.
  void match_few(double now) {
    std::vector<std::uint32_t> best;  // pair of each touched end
    for (const std::size_t end : touched_) {
      ends_[end].touched = false;
      best.push_back(best_of(end));
    }
    while (true) {
      std::uint32_t first = kNoHop;
      for (std::size_t i = 0; i < best.size(); ++i) {
        if (best[i] == kNoHop) continue;
        const Pair& pair = pairs_[best[i]];
        if (free_[pair.ends[0]] == kBusy || free_[pair.ends[1]] == kBusy) {
          best[i] = best_of(touched_[i]);
        }
        if (best[i] != kNoHop && (first == kNoHop || before(best[i], first))) first = best[i];
      }
      if (first == kNoHop) return;
      start(first, now);
    }
  }

  // By the rank of the better end, then of the other, then the number.
  bool before(std::uint32_t a, std::uint32_t b) const {
    const auto ranked = [&](std::uint32_t number) {
      const Pair& pair = pairs_[number];
      return outranks(pair.ends[1], pair.ends[0]) ? std::pair(pair.ends[1], pair.ends[0])
                                                  : std::pair(pair.ends[0], pair.ends[1]);
    };
    const auto [a_first, a_second] = ranked(a);
    const auto [b_first, b_second] = ranked(b);
    if (a_first != b_first) return outranks(a_first, b_first);
    if (a_second != b_second) return outranks(a_second, b_second);
    return a < b;
  }

  // After a round of messages that end together, all ends that could take part are ranked once.
  void match_many(double now) {
    std::size_t open = 0;  // touched ends that some pair could still use
    for (const std::size_t end : touched_) {
      ends_[end].touched = false;
      bool usable = false;
      for (const Link link : ends_[end].active) {
        if (free_[end] == kBusy || free_[link.partner] == kBusy) continue;
        usable = true;
        list(link.partner);
      }
      if (!usable) continue;
      list(end);
      ends_[end].open = true;
      ++open;
    }
    const auto below = [](const Listed& a, const Listed& b) {
      return a.left != b.left ? a.left < b.left : a.end > b.end;
    };
    std::make_heap(listed_.begin(), listed_.end(), below);
    for (auto last = listed_.end(); open > 0 && last != listed_.begin(); --last) {
      std::pop_heap(listed_.begin(), last, below);
      const std::size_t end = std::prev(last)->end;
      const std::uint32_t pair = best_of(end);
      std::size_t settled[3] = {end, end, end};
      if (pair != kNoHop) {
        std::copy(std::begin(pairs_[pair].ends), std::end(pairs_[pair].ends), settled);
        start(pair, now);
      }
      for (const std::size_t it : settled) open -= std::exchange(ends_[it].open, false) ? 1 : 0;
    }
    for (const Listed& it : listed_) ends_[it.end].listed = ends_[it.end].open = false;
    listed_.clear();
  }

  // With what it had left before the round began: starting changes that, and not the order.
  struct Listed {
    std::int64_t left = 0;
    std::size_t end = 0;
  };

  void list(std::size_t end) {
    if (std::exchange(ends_[end].listed, true)) return;
    listed_.push_back({ends_[end].left, end});
  }

  void start(std::uint32_t number, double now) {
    Pair& pair = pairs_[number];
    const RouteOptions& options = route_.options();
    Message message{now, 0, pair.sender, pair.receiver, 0, result_.items.size()};
    for (const std::size_t list : {0, 1}) {
      std::uint32_t& head = pair.head[list];
      while (head != kNoHop && message.bytes + bytes_[head] <= options.chunk) {
        message.bytes += bytes_[head];
        result_.items.push_back(head);
        head = std::exchange(next_[head], kNoHop);
      }
    }
    if (!pair.ready()) deactivate(number);
    for (const std::size_t e : pair.ends) {
      ends_[e].left -= message.bytes;
      free_[e] = kBusy;
    }
    message.end =
        now + options.message_seconds + static_cast<double>(message.bytes) / options.nic_bandwidth;
    running_.emplace(message.end, result_.messages.size());
    result_.messages.push_back(message);
  }

  void finish(std::size_t number) {
    const Message message = result_.messages[number];
    const std::size_t last = number + 1 < result_.messages.size()
                                 ? result_.messages[number + 1].first_item
                                 : result_.items.size();
    for (const std::size_t end :
         {nic_of(route_, message.sender), nics_ + nic_of(route_, message.receiver)}) {
      free_[end] = ends_[end].left;
      touch(end);
    }
    for (std::size_t i = message.first_item; i < last; ++i) arrive(result_.items[i]);
  }

  const Route& route_;
  std::size_t nics_;
  std::vector<End> ends_;
  std::vector<std::int64_t> free_;  // what each end has left; kBusy while it is
  std::vector<Pair> pairs_;
  std::vector<std::int64_t> bytes_;     // of each hop
  std::vector<std::uint32_t> pair_of_;  // of each remote hop
  std::vector<std::uint32_t> next_;     // in a pair's list
  std::vector<std::uint32_t> child_;    // the first hop that waits for this one
  std::vector<std::uint32_t> sibling_;  // the next that waits for the same
  std::vector<std::size_t> touched_;
  std::vector<Listed> listed_;
  using Running = std::pair<double, std::size_t>;
  std::priority_queue<Running, std::vector<Running>, std::greater<>> running_;
  Simulation result_;
};

}  // namespace

Simulation simulate_planned(const Route& route) { return Planned(route).run(); }

}  // namespace kimisys::reshard
