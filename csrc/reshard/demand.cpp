#include "reshard/demand.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <string>

namespace kimisys::reshard {
namespace {

// One tensor cut along every face of every fragment on either side: within a cell all elements have
// the same owners and receivers.
class Cells {
 public:
  explicit Cells(std::size_t dims) : cuts_(dims) {}

  void cut(const Region& region) {
    for (std::size_t d = 0; d < cuts_.size(); ++d) {
      cuts_[d].push_back(region.offset[d]);
      cuts_[d].push_back(region.offset[d] + region.extent[d]);
    }
  }

  void settle() {
    count_ = 1;
    for (Cuts& cuts : cuts_) {
      std::sort(cuts.begin(), cuts.end());
      cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
      count_ *= cuts.size() - 1;
    }
  }

  std::size_t count() const { return count_; }

  std::int64_t elements(std::size_t cell) const {
    std::int64_t product = 1;
    for (std::size_t d = cuts_.size(); d-- > 0;) {
      const std::size_t width = cuts_[d].size() - 1;
      product *= cuts_[d][cell % width + 1] - cuts_[d][cell % width];
      cell /= width;
    }
    return product;
  }

  // Calls visit(cell) for each cell of a region that cut() has seen.
  template <typename Visit>
  void of(const Region& region, const Visit& visit) const {
    walk(region, 0, 0, visit);
  }

 private:
  using Cuts = std::vector<std::int64_t>;

  template <typename Visit>
  void walk(const Region& region, std::size_t d, std::size_t cell, const Visit& visit) const {
    if (d == cuts_.size()) {
      visit(cell);
      return;
    }
    const Cuts& cuts = cuts_[d];
    const auto from = std::lower_bound(cuts.begin(), cuts.end(), region.offset[d]);
    const std::int64_t end = region.offset[d] + region.extent[d];
    for (auto at = from; *at < end; ++at) {
      walk(region, d + 1, cell * (cuts.size() - 1) + static_cast<std::size_t>(at - cuts.begin()),
           visit);
    }
  }

  std::vector<Cuts> cuts_;
  std::size_t count_ = 0;
};

class Collector {
 public:
  Collector(const Layout& source, const Layout& destination)
      : source_(source),
        destination_(destination),
        held_(fragments_by_tensor(source)),
        wanted_(fragments_by_tensor(destination)) {}

  std::vector<Demand> run() {
    std::vector<std::size_t> order(wanted_.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      const auto first = [&](std::size_t t) {
        return wanted_[t].empty() ? std::numeric_limits<std::size_t>::max() : wanted_[t].front();
      };
      return std::pair(first(a), a) < std::pair(first(b), b);
    });
    for (std::size_t turn = 0; turn < order.size(); ++turn) {
      if (!wanted_[order[turn]].empty()) collect(order[turn], static_cast<std::int64_t>(turn));
    }
    return std::move(demands_);
  }

 private:
  void collect(std::size_t wanted, std::int64_t turn) {
    const Tensor& tensor = destination_.tensors()[wanted];
    const auto held = source_.find_tensor(tensor.name);
    if (!held) return;
    Cells cells(tensor.shape.size());
    for (const std::size_t i : wanted_[wanted]) cells.cut(destination_.fragments()[i].region);
    for (const std::size_t i : held_[*held]) cells.cut(source_.fragments()[i].region);
    cells.settle();
    const std::vector<RankSets::Id> owners = sets(source_, held_[*held], cells);
    const std::vector<RankSets::Id> receivers = sets(destination_, wanted_[wanted], cells);
    const auto item = static_cast<std::int64_t>(itemsize(tensor.dtype));
    for (std::size_t cell = 0; cell < cells.count(); ++cell) {
      if (owners[cell] == 0 || receivers[cell] == 0) continue;
      Demand& demand = find(owners[cell], receivers[cell]);
      const std::int64_t bytes = cells.elements(cell) * item;
      demand.copies += 1;
      if (demand.pieces.empty() || demand.pieces.back().turn != turn) {
        demand.pieces.push_back({turn, 0});
      }
      demand.pieces.back().bytes += bytes;
    }
  }

  std::vector<RankSets::Id> sets(const Layout& layout, std::vector<std::size_t> fragments,
                                 const Cells& cells) {
    std::stable_sort(fragments.begin(), fragments.end(), [&](std::size_t a, std::size_t b) {
      return layout.fragments()[a].rank < layout.fragments()[b].rank;
    });
    std::vector<RankSets::Id> found(cells.count(), 0);
    for (const std::size_t i : fragments) {
      const Fragment& fragment = layout.fragments()[i];
      cells.of(fragment.region,
               [&](std::size_t cell) { found[cell] = sets_.add(found[cell], fragment.rank); });
    }
    return found;
  }

  Demand& find(RankSets::Id owners, RankSets::Id receivers) {
    const std::uint64_t key = std::uint64_t{owners} << 32U | receivers;
    const auto [at, is_new] = numbers_.try_emplace(key, demands_.size());
    if (is_new) demands_.push_back({sets_.ranks(owners), sets_.ranks(receivers), {}, 0});
    return demands_[at->second];
  }

  const Layout& source_;
  const Layout& destination_;
  std::vector<std::vector<std::size_t>> held_;
  std::vector<std::vector<std::size_t>> wanted_;
  RankSets sets_;
  std::unordered_map<std::uint64_t, std::size_t> numbers_;
  std::vector<Demand> demands_;
};

template <typename Side>
std::vector<Place> places_of(const Side& side) {
  std::vector<Place> places;
  for (const std::int64_t rank : side.ranks()) places.push_back(side.place_of(rank));
  return places;
}

using Labels = std::map<std::pair<std::size_t, std::string>, std::int64_t>;

// The instances' labels in the order of the model: "" (what stands outside the layers), "0", "1",
// ..., "10".
Labels number_labels(const SymbolicLayout& layout) {
  Labels labels;
  for (const LayoutBlock& block : layout.blocks()) {
    for (const Instance& instance : block.instances) {
      labels.emplace(std::pair(instance.label.size(), instance.label), 0);
    }
  }
  std::int64_t number = 0;
  for (auto& [label, its_number] : labels) its_number = number++;
  return labels;
}

// Members of a group whose ranks are the same, so that they have the same demands.
struct Twins {
  std::vector<std::int64_t> source;  // rank of each local rank of the template
  std::vector<std::int64_t> destination;
  std::vector<std::int64_t> turns;
};

std::vector<Twins> twins_of(const SymbolicPlan& plan, const Group& group, const Labels& labels) {
  std::map<std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>>, std::size_t> known;
  std::vector<Twins> all;
  const LayoutBlock& block = plan.destination().blocks()[group.block];
  for (const Group::Member& member : group.members) {
    std::vector<std::int64_t> source;
    for (std::size_t slot = 0; slot < group.sources.size(); ++slot) {
      const LayoutBlock& origin = plan.source().blocks()[group.sources[slot]];
      const std::vector<std::int64_t>& ranks = origin.instances[member.instances[slot]].ranks;
      // An instance may have more ranks than its block's fragments use.
      source.resize(group.first[slot]);
      source.insert(source.end(), ranks.begin(), ranks.end());
    }
    const Instance& instance = block.instances[member.instance];
    const auto [at, is_new] = known.try_emplace(std::pair(source, instance.ranks), all.size());
    if (is_new) all.push_back({std::move(source), instance.ranks, {}});
    all[at->second].turns.push_back(labels.at({instance.label.size(), instance.label}));
  }
  return all;
}

std::vector<std::int64_t> translate(const std::vector<std::int64_t>& local,
                                    const std::vector<std::int64_t>& ranks) {
  std::vector<std::int64_t> global;
  for (const std::int64_t rank : local) global.push_back(ranks[static_cast<std::size_t>(rank)]);
  std::sort(global.begin(), global.end());
  return global;
}

}  // namespace

RankSets::Id RankSets::add(Id set, std::int64_t rank) {
  if (nodes_[set].rank == rank) return set;
  const auto [at, is_new] = longer_.try_emplace({set, rank}, static_cast<Id>(nodes_.size()));
  if (is_new) nodes_.push_back({set, rank});
  return at->second;
}

RankSets::Id RankSets::number(const std::vector<std::int64_t>& ascending) {
  Id set = 0;
  for (const std::int64_t rank : ascending) set = add(set, rank);
  return set;
}

std::vector<std::int64_t> RankSets::ranks(Id set) const {
  std::vector<std::int64_t> ranks;
  for (; set != 0; set = nodes_[set].shorter) ranks.push_back(nodes_[set].rank);
  std::reverse(ranks.begin(), ranks.end());
  return ranks;
}

std::vector<Demand> demands_of(const Layout& source, const Layout& destination) {
  return Collector(source, destination).run();
}

std::vector<Demand> merge_demands(std::vector<Demand> demands) {
  RankSets sets;
  std::unordered_map<std::uint64_t, std::size_t> numbers;
  std::vector<Demand> merged;
  for (Demand& demand : demands) {
    const std::uint64_t key =
        std::uint64_t{sets.number(demand.owners)} << 32U | sets.number(demand.receivers);
    const auto [at, is_new] = numbers.try_emplace(key, merged.size());
    if (is_new) {
      merged.push_back(std::move(demand));
      continue;
    }
    Demand& sum = merged[at->second];
    sum.copies += demand.copies;
    sum.pieces.insert(sum.pieces.end(), demand.pieces.begin(), demand.pieces.end());
  }
  for (Demand& demand : merged) {
    std::stable_sort(demand.pieces.begin(), demand.pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.turn < b.turn; });
  }
  return merged;
}

std::vector<Demand> demands_of(const SymbolicPlan& plan) {
  constexpr std::int64_t kTurns = std::int64_t{1} << 32U;  // more than a block has tensors
  const Labels labels = number_labels(plan.destination());
  std::vector<Demand> demands;
  for (const Group& group : plan.groups()) {
    const Layout& wanted = *plan.destination().blocks()[group.block].layout;
    const std::vector<Demand> local = demands_of(*group.source, wanted);
    for (const Twins& twins : twins_of(plan, group, labels)) {
      const auto count = static_cast<std::int64_t>(twins.turns.size());
      for (const Demand& demand : local) {
        Demand made{translate(demand.owners, twins.source),
                    translate(demand.receivers, twins.destination),
                    {},
                    demand.copies * count};
        for (const std::int64_t turn : twins.turns) {
          made.pieces.push_back({turn * kTurns + demand.pieces.front().turn, demand.bytes()});
        }
        demands.push_back(std::move(made));
      }
    }
  }
  return merge_demands(std::move(demands));
}

std::shared_ptr<const Cluster> cluster_of(const SymbolicPlan& plan) {
  return std::make_shared<const Cluster>(places_of(plan.source()), places_of(plan.destination()));
}

std::shared_ptr<const Cluster> cluster_of(const Layout& source, const Layout& destination) {
  return std::make_shared<const Cluster>(places_of(source), places_of(destination));
}

}  // namespace kimisys::reshard
