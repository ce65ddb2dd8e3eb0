// Which source instances serve which destination instance, and which of these can share one plan.
#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;
constexpr std::uint64_t kNowhere = ~std::uint64_t{0};

struct Standing {
  std::size_t block = 0;
  std::size_t instance = 0;
  std::size_t tensor = 0;
};

// Where each tensor of a symbolic layout stands, by its spelled-out name. Names are looked up by
// their hash and compared, never stored.
class Directory {
 public:
  explicit Directory(const SymbolicLayout& layout) : layout_(layout) {
    entries_.reserve(layout.tensor_count());
    for (std::size_t b = 0; b < layout.blocks().size(); ++b) {
      const LayoutBlock& block = layout.blocks()[b];
      for (std::size_t i = 0; i < block.instances.size(); ++i) {
        for (std::size_t t = 0; t < block.layout->tensors().size(); ++t) {
          entries_.push_back({hash(name_of({b, i, t})), {b, i, t}});
        }
      }
    }
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.hash < b.hash; });
  }

  std::optional<Standing> find(const std::string& name) const {
    const std::size_t wanted = hash(name);
    auto at =
        std::lower_bound(entries_.begin(), entries_.end(), wanted,
                         [](const Entry& entry, std::size_t key) { return entry.hash < key; });
    for (; at != entries_.end() && at->hash == wanted; ++at) {
      if (name_of(at->standing) == name) return at->standing;
    }
    return std::nullopt;
  }

 private:
  struct Entry {
    std::size_t hash;
    Standing standing;
  };

  static std::size_t hash(const std::string& name) { return std::hash<std::string>()(name); }

  std::string name_of(const Standing& it) const {
    const LayoutBlock& block = layout_.blocks()[it.block];
    return expand(block.layout->tensors()[it.tensor].name, block.instances[it.instance].label);
  }

  const SymbolicLayout& layout_;
  std::vector<Entry> entries_;
};

// What an instance of the destination finds: equal for instances that can share a plan.
struct Found {
  std::vector<std::uint64_t> tensors;  // slot << 32 | tensor of the slot's block, or kNowhere
  std::vector<std::size_t> sources;    // the block of each slot
  std::vector<std::int64_t> neighbours;
  auto key() const { return std::tie(sources, neighbours, tensors); }
  bool operator<(const Found& other) const { return key() < other.key(); }
};

class Joiner {
 public:
  Joiner(const SymbolicLayout& source, const SymbolicLayout& destination)
      : source_(source), destination_(destination), directory_(source) {}

  std::vector<Group> run() {
    for (std::size_t b = 0; b < destination_.blocks().size(); ++b) join_block(b);
    return std::move(groups_);
  }

 private:
  void join_block(std::size_t b) {
    const LayoutBlock& block = destination_.blocks()[b];
    std::vector<const Fragment*> wanted(block.layout->tensors().size(), nullptr);
    for (std::size_t i = 0; i < block.layout->fragments().size(); ++i) {
      const Fragment*& first = wanted[block.layout->tensor_of(i)];
      if (first == nullptr && !block.layout->fragments()[i].region.empty()) {
        first = &block.layout->fragments()[i];
      }
    }
    std::map<Found, std::size_t> known;
    for (std::size_t i = 0; i < block.instances.size(); ++i) {
      Group::Member member{i, {}};
      Found found = look_up(block, block.instances[i], wanted, member);
      found.neighbours = neighbours(block, block.instances[i], found, member);
      const auto [at, is_new] = known.emplace(std::move(found), groups_.size());
      if (is_new) groups_.push_back(make_group(b, at->first, wanted));
      groups_[at->second].members.push_back(std::move(member));
    }
  }

  Found look_up(const LayoutBlock& block, const Instance& instance,
                const std::vector<const Fragment*>& wanted, Group::Member& member) const {
    Found found;
    std::map<std::pair<std::size_t, std::size_t>, std::size_t> slots;
    for (std::size_t t = 0; t < wanted.size(); ++t) {
      const std::string name = expand(block.layout->tensors()[t].name, instance.label);
      const auto standing = directory_.find(name);
      if (!standing) {
        if (wanted[t] != nullptr) report_unknown(name, *wanted[t], instance);
        found.tensors.push_back(kNowhere);
        continue;
      }
      const auto [slot, is_new] =
          slots.emplace(std::pair(standing->block, standing->instance), slots.size());
      if (is_new) {
        found.sources.push_back(standing->block);
        member.instances.push_back(standing->instance);
      }
      found.tensors.push_back(std::uint64_t{slot->second} << 32U | standing->tensor);
    }
    return found;
  }

  // Which ranks share nodes and devices across the two sides, by numbers that depend on nothing
  // else. Nodes of one side alone are all alike: they are far from everybody.
  std::vector<std::int64_t> neighbours(const LayoutBlock& block, const Instance& instance,
                                       const Found& found, const Group::Member& member) const {
    if (source_.places().empty() && destination_.places().empty()) return {};
    using Key = std::pair<std::int64_t, std::int64_t>;
    std::set<Key> senders;
    std::vector<Place> places;
    for (std::size_t slot = 0; slot < found.sources.size(); ++slot) {
      const LayoutBlock& held = source_.blocks()[found.sources[slot]];
      const Instance& from = held.instances[member.instances[slot]];
      for (std::size_t i = 0; i < local_ranks(*held.layout); ++i) {
        places.push_back(source_.place_of(from.ranks[i]));
        senders.insert({places.back().node, places.back().device});
        senders.insert({places.back().node, -1});
      }
    }
    const std::size_t sources = places.size();
    std::map<Key, std::int64_t> shared;
    for (std::size_t i = 0; i < local_ranks(*block.layout); ++i) {
      places.push_back(destination_.place_of(instance.ranks[i]));
      for (const Key& key :
           {Key(places.back().node, -1), Key(places.back().node, places.back().device)}) {
        if (senders.contains(key)) shared.emplace(key, static_cast<std::int64_t>(shared.size()));
      }
    }
    std::vector<std::int64_t> numbers = {static_cast<std::int64_t>(sources)};
    const auto number = [&](const Key& key) {
      const auto at = shared.find(key);
      return at == shared.end() ? -1 : at->second;
    };
    for (const Place& place : places) {
      numbers.push_back(number({place.node, -1}));
      numbers.push_back(number({place.node, place.device}));
    }
    return numbers;
  }

  [[noreturn]] void report_unknown(const std::string& name, const Fragment& fragment,
                                   const Instance& instance) const {
    fail(kBad, "tensor '", name, "' region ", fragment.region, " is wanted by destination rank ",
         instance.ranks[static_cast<std::size_t>(fragment.rank)],
         " but the source layout does not know it; its ranks are ", ranks_text(source_.ranks()),
         ". Add it to the source or map its name");
  }

  // The source's template: what the wanted tensors need of each slot's block, side by side, under
  // the destination's names.
  Group make_group(std::size_t b, const Found& found,
                   const std::vector<const Fragment*>& wanted) const {
    Group group;
    group.block = b;
    group.sources = found.sources;
    const Layout& destination = *destination_.blocks()[b].layout;
    std::vector<Tensor> tensors;
    std::vector<Buffer> buffers;
    std::vector<Fragment> fragments;
    std::int64_t first = 0;
    for (std::size_t slot = 0; slot < found.sources.size(); ++slot) {
      const Layout& layout = *source_.blocks()[found.sources[slot]].layout;
      group.first.push_back(static_cast<std::size_t>(first));
      std::vector<std::size_t> names(layout.tensors().size(), wanted.size());
      for (std::size_t t = 0; t < wanted.size(); ++t) {
        if (found.tensors[t] >> 32U != slot) continue;
        const auto held = static_cast<std::size_t>(found.tensors[t] & 0xffffffffU);
        const Tensor& it = layout.tensors()[held];
        tensors.push_back({destination.tensors()[t].name, it.dtype, it.shape});
        if (wanted[t] != nullptr) names[held] = t;
      }
      std::vector<bool> used(layout.buffers().size(), false);
      for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
        if (names[layout.tensor_of(i)] == wanted.size()) continue;
        Fragment it = layout.fragments()[i];
        it.tensor = destination.tensors()[names[layout.tensor_of(i)]].name;
        it.rank += first;
        fragments.push_back(std::move(it));
        group.origins.push_back({slot, i});
        used[layout.buffer_of(i)] = true;
      }
      for (std::size_t i = 0; i < used.size(); ++i) {
        if (!used[i]) continue;
        const Buffer& it = layout.buffers()[i];
        buffers.push_back({it.rank + first, it.name, it.nbytes});
      }
      first += static_cast<std::int64_t>(local_ranks(layout));
    }
    group.source = std::make_shared<const Layout>(std::move(tensors), std::move(buffers),
                                                  std::move(fragments));
    return group;
  }

  const SymbolicLayout& source_;
  const SymbolicLayout& destination_;
  const Directory directory_;
  std::vector<Group> groups_;
};

}  // namespace

std::vector<Group> join(const SymbolicLayout& source, const SymbolicLayout& destination) {
  return Joiner(source, destination).run();
}

}  // namespace kimisys::reshard
