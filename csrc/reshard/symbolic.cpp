#include "reshard/symbolic.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <ostream>
#include <set>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "reshard/plan.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kLayout;

// Replaces what is in `out`, whose memory is used again.
void expand_into(std::string& out, std::string_view name, std::string_view label) {
  out.clear();
  for (std::size_t at = 0; at < name.size();) {
    const std::size_t next = name.find("{}", at);
    out.append(name.substr(at, next - at));
    if (next == std::string_view::npos) return;
    out.append(label);
    at = next + 2;
  }
}

// One name of one instance, by the hash of its spelled-out form.
struct Named {
  std::size_t hash;
  std::uint32_t block;
  std::uint32_t instance;
  std::uint32_t index;
};

// The first two entries that mean the same, if any. `same` compares two entries of equal hash.
template <typename Same>
const Named* first_repeat(std::vector<Named>& names, Same same, const Named*& other) {
  std::sort(names.begin(), names.end(), [](const Named& a, const Named& b) {
    return std::tie(a.hash, a.block, a.instance, a.index) <
           std::tie(b.hash, b.block, b.instance, b.index);
  });
  for (std::size_t i = 1; i < names.size(); ++i) {
    for (std::size_t j = i; j-- > 0 && names[j].hash == names[i].hash;) {
      if (!same(names[j], names[i])) continue;
      other = &names[j];
      return &names[i];
    }
  }
  return nullptr;
}

// Appends the names of one kind of table; `rank_of` tells equal names of several ranks apart.
template <typename TableOf, typename LabelOf, typename RankOf>
void collect(const std::vector<LayoutBlock>& blocks, std::vector<Named>& names, TableOf table_of,
             LabelOf label_of, RankOf rank_of) {
  std::string text;
  for (std::uint32_t b = 0; b < blocks.size(); ++b) {
    const auto& table = table_of(*blocks[b].layout);
    for (std::uint32_t i = 0; i < blocks[b].instances.size(); ++i) {
      const Instance& instance = blocks[b].instances[i];
      for (std::uint32_t k = 0; k < table.size(); ++k) {
        expand_into(text, table[k].name, label_of(instance));
        KIMISYS_CHECK(text.size() <= kMaxName, kBad, "a name of instance '", instance.label,
                      "' has ", text.size(), " bytes when spelled out; at most ", kMaxName,
                      " are supported");
        const auto rank = static_cast<std::size_t>(rank_of(instance, table[k]));
        names.push_back(
            {std::hash<std::string_view>()(text) + rank * 0x9e3779b97f4a7c15U, b, i, k});
      }
    }
  }
}

void check_tensor_names(const std::vector<LayoutBlock>& blocks, std::vector<Named>& names) {
  names.clear();
  collect(
      blocks, names, [](const Layout& layout) -> auto& { return layout.tensors(); },
      [](const Instance& it) -> auto& { return it.label; },
      [](const Instance&, const Tensor&) { return 0; });
  const auto name_of = [&](const Named& it) {
    const LayoutBlock& block = blocks[it.block];
    return expand(block.layout->tensors()[it.index].name, block.instances[it.instance].label);
  };
  const Named* other = nullptr;
  const Named* twice = first_repeat(
      names, [&](const Named& a, const Named& b) { return name_of(a) == name_of(b); }, other);
  KIMISYS_CHECK(twice == nullptr, kBad, "tensor '", name_of(*twice),
                "' stands in two instances: ", blocks[other->block].instances[other->instance],
                " and ", blocks[twice->block].instances[twice->instance],
                ". All ranks that hold a tensor belong into one block");
}

void check_buffer_names(const std::vector<LayoutBlock>& blocks, std::vector<Named>& names) {
  const auto rank_of = [](const Instance& instance, const Buffer& buffer) {
    return instance.ranks[static_cast<std::size_t>(buffer.rank)];
  };
  names.clear();
  collect(
      blocks, names, [](const Layout& layout) -> auto& { return layout.buffers(); },
      [](const Instance& it) -> auto& { return it.buffer_label; }, rank_of);
  const auto key = [&](const Named& it) {
    const Instance& instance = blocks[it.block].instances[it.instance];
    const Buffer& buffer = blocks[it.block].layout->buffers()[it.index];
    return std::pair(rank_of(instance, buffer), expand(buffer.name, instance.buffer_label));
  };
  const Named* other = nullptr;
  const Named* twice =
      first_repeat(names, [&](const Named& a, const Named& b) { return key(a) == key(b); }, other);
  KIMISYS_CHECK(twice == nullptr, kBad, "buffer '", key(*twice).second, "' of rank ",
                key(*twice).first,
                " stands in two instances: ", blocks[other->block].instances[other->instance],
                " and ", blocks[twice->block].instances[twice->instance],
                ". Put \"{}\" into its name, or give the instances buffer labels");
}

bool before(const Instance& a, const Instance& b) {
  const auto key = [](const Instance& it) {
    return std::tuple(it.label.size(), std::string_view(it.label), it.buffer_label.size(),
                      std::string_view(it.buffer_label), std::cref(it.ranks).get());
  };
  return key(a) < key(b);
}

// The first tensor's name, else the first buffer's rank and name: these stand in one block only.
std::tuple<std::string, std::int64_t, std::string> key_of(const LayoutBlock& block) {
  const Instance& first = block.instances.front();
  std::string tensor;
  if (!block.layout->tensors().empty()) {
    tensor = expand(block.layout->tensors().front().name, first.label);
  }
  if (block.layout->buffers().empty()) return {tensor, -1, ""};
  const Buffer& buffer = block.layout->buffers().front();
  return {tensor, first.ranks[static_cast<std::size_t>(buffer.rank)],
          expand(buffer.name, first.buffer_label)};
}

}  // namespace

std::string expand(std::string_view name, std::string_view label) {
  std::string out;
  expand_into(out, name, label);
  return out;
}

std::size_t local_ranks(const Layout& layout) {
  return layout.buffers().empty() ? 0 : static_cast<std::size_t>(layout.buffers().back().rank) + 1;
}

SymbolicLayout::SymbolicLayout(std::vector<LayoutBlock> blocks, std::vector<Place> places)
    : blocks_(std::move(blocks)) {
  // A layout of places alone checks and sorts them.
  places_ = Layout({}, {}, {}, {}, std::move(places)).places();
  for (LayoutBlock& block : blocks_) {
    check_block(block);
    std::sort(block.instances.begin(), block.instances.end(), before);
  }
  std::stable_sort(blocks_.begin(), blocks_.end(), [](const LayoutBlock& a, const LayoutBlock& b) {
    return key_of(a) < key_of(b);
  });
  check_bytes();
  check_names();
  index();
}

void SymbolicLayout::check_block(const LayoutBlock& block) const {
  KIMISYS_CHECK(block.layout, kBad, "a block has no layout; give it one");
  const Layout& layout = *block.layout;
  const std::string what = layout.tensors().empty()
                               ? "a block without tensors"
                               : "the block of tensor '" + layout.tensors().front().name + "'";
  KIMISYS_CHECK(!block.instances.empty(), kBad, what,
                " has no instances; give it one, or leave the block out");
  KIMISYS_CHECK(layout.places().empty(), kBad, what,
                " has places in its layout; give them to the symbolic layout, for its own ranks");
  const std::size_t locals = local_ranks(layout);
  for (const Instance& instance : block.instances) {
    KIMISYS_CHECK(std::max(instance.label.size(), instance.buffer_label.size()) <= kMaxName, kBad,
                  "a label of ", what, " has more than ", kMaxName, " bytes");
    KIMISYS_CHECK(locals <= instance.ranks.size(), kBad, "instance '", instance.label, "' of ",
                  what, " has ", instance.ranks.size(), " ranks, but the layout has local rank ",
                  locals - 1, "; local rank i needs ranks[i]");
    std::vector<std::int64_t> sorted = instance.ranks;
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    KIMISYS_CHECK(twice == sorted.end(), kBad, "instance '", instance.label, "' of ", what,
                  " names rank ", twice == sorted.end() ? 0 : *twice,
                  " twice; each local rank needs a rank of its own");
    KIMISYS_CHECK(sorted.empty() || sorted.front() >= 0, kBad, "instance '", instance.label,
                  "' of ", what, " names the negative rank ", sorted.empty() ? 0 : sorted.front());
  }
}

void SymbolicLayout::check_bytes() const {
  std::int64_t sum = 0;
  for (const LayoutBlock& block : blocks_) {
    std::int64_t each = 0;  // cannot overflow: the layout has at most kMaxTotalBytes
    for (const Buffer& buffer : block.layout->buffers()) each += buffer.nbytes;
    const auto count = static_cast<std::int64_t>(block.instances.size());
    const bool fits = each == 0 || count <= (kMaxTotalBytes - sum) / each;
    KIMISYS_CHECK(fits, kBad, "the buffers have more than ", kMaxTotalBytes,
                  " bytes in all; check their sizes and the instances");
    sum += each * count;
  }
}

void SymbolicLayout::check_names() const {
  std::size_t tensors = 0;
  std::size_t buffers = 0;
  for (const LayoutBlock& block : blocks_) {
    const auto room = [&](std::size_t used, std::size_t each) {
      return each == 0 || block.instances.size() <= (kMaxNames - used) / each;
    };
    KIMISYS_CHECK(room(tensors, block.layout->tensors().size()) &&
                      room(buffers, block.layout->buffers().size()),
                  kBad, "the layout has more than ", kMaxNames, " tensors or buffers");
    tensors += block.instances.size() * block.layout->tensors().size();
    buffers += block.instances.size() * block.layout->buffers().size();
  }
  std::vector<Named> names;
  names.reserve(std::max(tensors, buffers));
  check_tensor_names(blocks_, names);
  check_buffer_names(blocks_, names);
}

void SymbolicLayout::index() {
  std::vector<std::pair<std::int64_t, Seat>> seated;
  for (std::size_t b = 0; b < blocks_.size(); ++b) {
    const Layout& layout = *blocks_[b].layout;
    const std::size_t count = local_ranks(layout);
    fragments_.emplace_back(count, layout.fragments().size(),
                            [&](std::size_t i) { return layout.fragments()[i].rank; });
    padding_.emplace_back(count, layout.padding().size(),
                          [&](std::size_t i) { return layout.padding()[i].rank; });
    for (std::size_t i = 0; i < blocks_[b].instances.size(); ++i) {
      const std::vector<std::int64_t>& ranks = blocks_[b].instances[i].ranks;
      for (std::size_t k = 0; k < ranks.size(); ++k) seated.push_back({ranks[k], {b, i, k}});
    }
  }
  for (const auto& entry : seated) ranks_.push_back(entry.first);
  for (const Place& place : places_) ranks_.push_back(place.rank);
  std::sort(ranks_.begin(), ranks_.end());
  ranks_.erase(std::unique(ranks_.begin(), ranks_.end()), ranks_.end());
  std::stable_sort(seated.begin(), seated.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  auto next = seated.begin();
  for (const std::int64_t rank : ranks_) {
    first_seat_.push_back(seats_.size());
    for (; next != seated.end() && next->first == rank; ++next) seats_.push_back(next->second);
  }
  first_seat_.push_back(seats_.size());
}

Place SymbolicLayout::place_of(std::int64_t rank) const {
  const auto found =
      std::lower_bound(places_.begin(), places_.end(), rank,
                       [](const Place& place, std::int64_t it) { return place.rank < it; });
  return found != places_.end() && found->rank == rank ? *found : Place{.rank = rank};
}

std::size_t SymbolicLayout::tensor_count() const {
  std::size_t sum = 0;
  for (const LayoutBlock& block : blocks_) {
    sum += block.instances.size() * block.layout->tensors().size();
  }
  return sum;
}

std::size_t SymbolicLayout::fragment_count() const {
  std::size_t sum = 0;
  for (const LayoutBlock& block : blocks_) {
    sum += block.instances.size() * block.layout->fragments().size();
  }
  return sum;
}

std::int64_t SymbolicLayout::nbytes() const {
  std::int64_t sum = 0;
  for (const LayoutBlock& block : blocks_) {
    std::int64_t each = 0;
    for (const Buffer& buffer : block.layout->buffers()) each += buffer.nbytes;
    sum += each * static_cast<std::int64_t>(block.instances.size());
  }
  return sum;
}

std::vector<Tensor> SymbolicLayout::tensors() const {
  std::vector<Tensor> all;
  all.reserve(tensor_count());
  for (const LayoutBlock& block : blocks_) {
    for (const Instance& instance : block.instances) {
      for (const Tensor& tensor : block.layout->tensors()) {
        all.push_back({expand(tensor.name, instance.label), tensor.dtype, tensor.shape});
      }
    }
  }
  std::sort(all.begin(), all.end(),
            [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  return all;
}

std::vector<SymbolicLayout::Seat> SymbolicLayout::seats_of(std::int64_t rank) const {
  const auto found = std::lower_bound(ranks_.begin(), ranks_.end(), rank);
  KIMISYS_CHECK(found != ranks_.end() && *found == rank, kBad, "the layout has no rank ", rank,
                "; its ranks are ", ranks_text(ranks_));
  const auto at = static_cast<std::size_t>(found - ranks_.begin());
  return {seats_.begin() + static_cast<std::ptrdiff_t>(first_seat_[at]),
          seats_.begin() + static_cast<std::ptrdiff_t>(first_seat_[at + 1])};
}

Layout SymbolicLayout::of_rank(std::int64_t rank) const {
  std::vector<Tensor> tensors;
  std::vector<Buffer> buffers;
  std::vector<Fragment> fragments;
  std::vector<Padding> padding;
  for (const Seat& seat : seats_of(rank)) {
    const Instance& instance = blocks_[seat.block].instances[seat.instance];
    const Layout& layout = *blocks_[seat.block].layout;
    std::vector<std::size_t> named;
    for (const std::size_t i : fragments_of(seat.block, seat.local)) {
      const Fragment& it = layout.fragments()[i];
      named.push_back(layout.tensor_of(i));
      fragments.push_back({expand(it.tensor, instance.label), it.region, rank,
                           expand(it.buffer, instance.buffer_label), it.byte_offset,
                           it.byte_strides});
    }
    std::sort(named.begin(), named.end());
    named.erase(std::unique(named.begin(), named.end()), named.end());
    for (const std::size_t i : named) {
      const Tensor& it = layout.tensors()[i];
      tensors.push_back({expand(it.name, instance.label), it.dtype, it.shape});
    }
    for (const std::size_t i : padding_of(seat.block, seat.local)) {
      const Padding& it = layout.padding()[i];
      padding.push_back(
          {rank, expand(it.buffer, instance.buffer_label), it.byte_offset, it.nbytes});
    }
    for (const Buffer& it : layout.buffers_of(static_cast<std::int64_t>(seat.local))) {
      buffers.push_back({rank, expand(it.name, instance.buffer_label), it.nbytes});
    }
  }
  std::vector<Place> places;
  std::copy_if(places_.begin(), places_.end(), std::back_inserter(places),
               [rank](const Place& place) { return place.rank == rank; });
  return {std::move(tensors), std::move(buffers), std::move(fragments), std::move(padding),
          std::move(places)};
}

Layout SymbolicLayout::concrete() const {
  std::vector<Buffer> buffers;
  std::vector<Fragment> fragments;
  std::vector<Padding> padding;
  fragments.reserve(fragment_count());
  for (const LayoutBlock& block : blocks_) {
    for (const Instance& instance : block.instances) {
      const auto rank_of = [&](const auto& it) {
        return instance.ranks[static_cast<std::size_t>(it.rank)];
      };
      for (const Buffer& it : block.layout->buffers()) {
        buffers.push_back({rank_of(it), expand(it.name, instance.buffer_label), it.nbytes});
      }
      for (const Fragment& it : block.layout->fragments()) {
        fragments.push_back({expand(it.tensor, instance.label), it.region, rank_of(it),
                             expand(it.buffer, instance.buffer_label), it.byte_offset,
                             it.byte_strides});
      }
      for (const Padding& it : block.layout->padding()) {
        padding.push_back(
            {rank_of(it), expand(it.buffer, instance.buffer_label), it.byte_offset, it.nbytes});
      }
    }
  }
  return {tensors(), std::move(buffers), std::move(fragments), std::move(padding), places_};
}

std::ostream& operator<<(std::ostream& stream, const Instance& instance) {
  stream << "Instance('" << instance.label << "', ranks " << ranks_text(instance.ranks);
  if (instance.buffer_label != instance.label) {
    stream << ", buffer label '" << instance.buffer_label << "'";
  }
  return stream << ")";
}

std::ostream& operator<<(std::ostream& stream, const LayoutBlock& block) {
  return stream << "Block(" << *block.layout << ", " << block.instances.size() << " instances)";
}

std::ostream& operator<<(std::ostream& stream, const SymbolicLayout& layout) {
  return stream << "SymbolicLayout(" << layout.blocks().size() << " blocks, "
                << layout.tensor_count() << " tensors, " << layout.fragment_count()
                << " fragments, " << layout.nbytes() << " bytes on ranks "
                << ranks_text(layout.ranks()) << ")";
}

}  // namespace kimisys::reshard
