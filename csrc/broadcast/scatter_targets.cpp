#include "broadcast/scatter_targets.h"

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "base/error.h"
#include "broadcast/mix.h"
#include "reshard/box.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Fragment;
using reshard::Layout;
using reshard::Plan;
using reshard::Region;
using reshard::Step;
using reshard::Tensor;

// A part of a box with the rounds in which it counts.
struct Part {
  Region box;
  std::vector<std::size_t> rounds;
};

std::uint64_t counter_at(const Tensor& tensor, const Dims& corner) {
  std::uint64_t index = 0;
  for (std::size_t d = 0; d < tensor.shape.size(); ++d) {
    index =
        index * static_cast<std::uint64_t>(tensor.shape[d]) + static_cast<std::uint64_t>(corner[d]);
  }
  return tensor_key(tensor.name) + index * kGolden;
}

// Does the destination hold `counted` as a part of `fragment`, at the same bytes?
bool is_part(const Fragment& fragment, const Fragment& counted) {
  if (fragment.rank != counted.rank || fragment.buffer != counted.buffer ||
      !reshard::contains(fragment.region, counted.region) ||
      reshard::byte_offset_at(fragment, counted.region.offset) != counted.byte_offset) {
    return false;
  }
  // Where a box has one element in a dimension, its stride is of no consequence.
  for (std::size_t d = 0; d < counted.byte_strides.size(); ++d) {
    if (counted.region.extent[d] > 1 && fragment.byte_strides[d] != counted.byte_strides[d]) {
      return false;
    }
  }
  return true;
}

// Cuts a box where the rounds that count it change.
std::vector<Part> cut(const Region& box, std::span<const Counted> counted) {
  std::vector<Part> parts = {{box, {}}};
  for (const Counted& it : counted) {
    std::vector<Part> next;
    for (Part& part : parts) {
      const std::optional<Region> common = reshard::intersect(part.box, it.box);
      if (!common) {
        next.push_back(std::move(part));
        continue;
      }
      std::vector<Region> rest;
      reshard::subtract(part.box, *common, rest);
      for (Region& region : rest) next.push_back({std::move(region), part.rounds});
      part.rounds.push_back(it.round);
      next.push_back({*common, std::move(part.rounds)});
    }
    parts = std::move(next);
  }
  return parts;
}

// Of each of the rank's own fragments the steps that read it, and which number the fragment has
// among the rank's (Layout::of_rank keeps the order).
std::vector<std::vector<const Step*>> steps_by_fragment(const Plan& plan, std::int64_t rank) {
  const std::vector<Fragment>& fragments = plan.source().fragments();
  std::vector<std::size_t> own(fragments.size(), fragments.size());
  std::size_t count = 0;
  for (std::size_t i = 0; i < fragments.size(); ++i) {
    if (fragments[i].rank == rank) own[i] = count++;
  }
  std::vector<std::vector<const Step*>> steps(count);
  for (const Step& step : plan.steps()) {
    if (step.region.empty() || own[step.source_fragment] == fragments.size()) continue;
    steps[own[step.source_fragment]].push_back(&step);
  }
  return steps;
}

// The number of a sum, which is added if it is new.
class SumTable {
 public:
  explicit SumTable(std::vector<Sum>& sums) : sums_(sums) {
    for (std::size_t i = 0; i < sums.size(); ++i) known_[{sums[i].tensor, sums[i].rounds}] = i;
  }
  std::size_t find(std::size_t tensor, const std::vector<std::size_t>& rounds) {
    const auto [found, added] = known_.try_emplace({tensor, rounds}, sums_.size());
    if (added) sums_.push_back({tensor, rounds});
    return found->second;
  }

 private:
  std::vector<Sum>& sums_;
  std::map<std::pair<std::size_t, std::vector<std::size_t>>, std::size_t> known_;
};

}  // namespace

std::vector<std::vector<Counted>> counted_boxes(const Layout& destination,
                                                std::span<const Layout> rounds) {
  std::vector<std::vector<Counted>> boxes(destination.fragments().size());
  const std::vector<std::vector<std::size_t>> groups = reshard::fragments_by_tensor(destination);
  for (std::size_t round = 0; round < rounds.size(); ++round) {
    for (const Fragment& counted : rounds[round].fragments()) {
      if (counted.region.empty()) continue;
      const std::optional<std::size_t> tensor = destination.find_tensor(counted.tensor);
      const auto fits = [&](std::size_t i) { return is_part(destination.fragments()[i], counted); };
      const std::vector<std::size_t> none;
      const std::vector<std::size_t>& group = tensor ? groups[*tensor] : none;
      const auto found = std::find_if(group.begin(), group.end(), fits);
      KIMISYS_CHECK(found != group.end(), ErrorCode::kLayout, "round ", round, " counts ",
                    counted.region, " of tensor '", counted.tensor, "' in buffer '", counted.buffer,
                    "' of rank ", counted.rank,
                    ", which is no part of a fragment of the destination; make the rounds from "
                    "the plan's destination");
      boxes[*found].push_back({round, counted.region});
    }
  }
  return boxes;
}

Targets::Targets(const Plan& plan, std::int64_t source_rank,
                 const std::vector<std::vector<Counted>>& counted, std::vector<Sum>& sums)
    : rank_(source_rank), layout_(plan.source().of_rank(source_rank)), blocks_(layout_) {
  const Layout& destination = plan.destination();
  const auto steps = steps_by_fragment(plan, source_rank);
  SumTable table(sums);
  for (std::size_t b = 0; b < blocks_.blocks().size(); ++b) {
    const Block& block = blocks_.blocks()[b];
    const std::size_t tensor = layout_.tensor_of(block.fragment);
    for (const Step* step : steps[block.fragment]) {
      const std::optional<Region> common = reshard::intersect(block.region, step->region);
      if (!common) continue;
      const std::size_t to = step->destination_fragment;
      const Fragment& fragment = destination.fragments()[to];
      for (Part& part : cut(*common, counted[to])) {
        targets_.push_back({.buffer = destination.buffer_of(to),
                            .sum = table.find(tensor, part.rounds),
                            .box = part.box,
                            .offset = reshard::byte_offset_at(fragment, part.box.offset),
                            .strides = fragment.byte_strides,
                            .counter = counter_at(layout_.tensors()[tensor], part.box.offset)});
      }
    }
    if (targets_.size() == begins_.back()) continue;
    needed_.push_back(static_cast<std::uint32_t>(b));
    begins_.push_back(targets_.size());
  }
}

std::size_t Targets::find(std::uint32_t block) const {
  const auto found = std::lower_bound(needed_.begin(), needed_.end(), block);
  if (found == needed_.end() || *found != block) return needed_.size();
  return static_cast<std::size_t>(found - needed_.begin());
}

std::vector<std::size_t> Targets::places(std::span<const std::uint32_t> blocks) const {
  std::vector<std::size_t> places;
  places.reserve(blocks.size());
  for (const std::uint32_t block : blocks) {
    places.push_back(find(block));
    KIMISYS_CHECK(places.back() < needed_.size(), ErrorCode::kLayout, "block ", block,
                  " of trainer rank ", rank_, " is not needed here; ask for those of blocks()");
  }
  std::vector<std::size_t> sorted = places;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  KIMISYS_CHECK(twice == sorted.end(), ErrorCode::kLayout, "block ", needed_[*twice],
                " of trainer rank ", rank_, " is given twice; give each once");
  return places;
}

Range Targets::span(std::size_t place) const {
  const Fragment& from = fragment(place);
  std::int64_t begin = std::numeric_limits<std::int64_t>::max();
  std::int64_t end = 0;
  for (const Target& target : of(place)) {
    const std::int64_t first = reshard::byte_offset_at(from, target.box.offset);
    std::int64_t last = first;
    for (std::size_t d = 0; d < target.box.extent.size(); ++d) {
      last += (target.box.extent[d] - 1) * from.byte_strides[d];
    }
    begin = std::min(begin, first);
    end = std::max(end, last + itemsize(tensor(place).dtype));
  }
  return {begin, end - begin};
}

}  // namespace kimisys::broadcast
