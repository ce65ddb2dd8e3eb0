#include "reshard/symbolic_plan.h"

#include <algorithm>
#include <ostream>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "reshard/choice.h"
#include "reshard/symbolic_part.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

// The two sides of one member, spelled out: what fails for the template fails here by real names.
void plan_spelled_out(const SymbolicLayout& source, const SymbolicLayout& destination,
                      const Group& group, const Group::Member& member) {
  Part from(source);
  for (const Group::Origin& it : group.origins) {
    from.add(group.sources[it.slot], member.instances[it.slot], it.fragment);
  }
  for (std::size_t slot = 0; slot < group.sources.size(); ++slot) {
    const LayoutBlock& held = source.blocks()[group.sources[slot]];
    const std::size_t instance = member.instances[slot];
    for (std::size_t i = 0; i < held.layout->tensors().size(); ++i) {
      from.add_tensor(group.sources[slot], instance, i);
    }
    for (const std::int64_t rank : held.instances[instance].ranks) from.add_place(rank);
  }
  Part to(destination);
  const Layout& block = *destination.blocks()[group.block].layout;
  for (std::size_t i = 0; i < block.tensors().size(); ++i) {
    to.add_tensor(group.block, member.instance, i);
  }
  for (std::size_t i = 0; i < block.fragments().size(); ++i) {
    to.add(group.block, member.instance, i);
  }
  for (std::size_t i = 0; i < block.padding().size(); ++i) {
    to.add_padding(group.block, member.instance, i);
  }
  for (std::size_t i = 0; i < block.buffers().size(); ++i) {
    to.add_buffer(group.block, member.instance, i);
  }
  make_plan(from.layout(), to.layout());
}

// Where the ranks of each member run, in the order of the template's ranks.
std::vector<Placement> placements_of(const SymbolicLayout& source,
                                     const SymbolicLayout& destination, const Group& group) {
  const auto ranks_of = [](const Layout& layout) {
    std::vector<std::size_t> ranks;
    for (const Buffer& buffer : layout.buffers()) {
      const auto rank = static_cast<std::size_t>(buffer.rank);
      if (ranks.empty() || ranks.back() != rank) ranks.push_back(rank);
    }
    return ranks;
  };
  const std::vector<std::size_t> from = ranks_of(*group.source);
  const std::vector<std::size_t> to = ranks_of(*destination.blocks()[group.block].layout);
  std::vector<Placement> placements;
  for (const Group::Member& member : group.members) {
    Placement& it = placements.emplace_back();
    std::size_t slot = 0;
    for (const std::size_t rank : from) {
      while (slot + 1 < group.first.size() && rank >= group.first[slot + 1]) ++slot;
      const Instance& held = source.blocks()[group.sources[slot]].instances[member.instances[slot]];
      it.source.push_back(source.place_of(held.ranks[rank - group.first[slot]]));
    }
    const Instance& wanted = destination.blocks()[group.block].instances[member.instance];
    for (const std::size_t rank : to) {
      it.destination.push_back(destination.place_of(wanted.ranks[rank]));
    }
  }
  return placements;
}

}  // namespace

SymbolicPlan::SymbolicPlan(std::shared_ptr<const SymbolicLayout> source,
                           std::shared_ptr<const SymbolicLayout> destination)
    : source_(std::move(source)),
      destination_(std::move(destination)),
      groups_(join(*source_, *destination_)) {
  Loads loads;
  for (Group& group : groups_) {
    const std::shared_ptr<const Layout>& block = destination_->blocks()[group.block].layout;
    try {
      group.plan = std::make_shared<const Plan>(
          group.source, block,
          make_steps(*group.source, *block, placements_of(*source_, *destination_, group), loads));
    } catch (const Error&) {
      plan_spelled_out(*source_, *destination_, group, group.members.front());
      throw;
    }
  }
  index();
}

SymbolicPlan::SymbolicPlan(std::shared_ptr<const SymbolicLayout> source,
                           std::shared_ptr<const SymbolicLayout> destination,
                           std::vector<Group> groups)
    : source_(std::move(source)), destination_(std::move(destination)), groups_(std::move(groups)) {
  index();
}

void SymbolicPlan::index() {
  for (const LayoutBlock& block : destination_->blocks()) {
    member_of_.emplace_back(block.instances.size());
  }
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    const Layout& from = *group.source;
    const Layout& to = *destination_->blocks()[group.block].layout;
    const std::vector<Step>& steps = group.plan->steps();
    group.steps_from = Lists(local_ranks(from), steps.size(), [&](std::size_t i) {
      return from.fragments()[steps[i].source_fragment].rank;
    });
    group.steps_to = Lists(local_ranks(to), steps.size(), [&](std::size_t i) {
      return to.fragments()[steps[i].destination_fragment].rank;
    });
    for (std::size_t m = 0; m < group.members.size(); ++m) {
      const Group::Member& member = group.members[m];
      member_of_[group.block][member.instance] = {g, m};
      for (std::size_t slot = 0; slot < group.sources.size(); ++slot) {
        uses_.push_back({group.sources[slot], member.instances[slot], g, m, slot});
      }
    }
    const auto count = static_cast<std::int64_t>(group.members.size());
    const Proof& proof = group.plan->proof();
    proof_.destination_bytes += proof.destination_bytes * count;
    proof_.copied_bytes += proof.copied_bytes * count;
    proof_.padding_bytes += proof.padding_bytes * count;
    proof_.copies += proof.copies * count;
  }
  std::stable_sort(uses_.begin(), uses_.end(), [](const Use& a, const Use& b) {
    return std::tie(a.block, a.instance) < std::tie(b.block, b.instance);
  });
}

std::span<const SymbolicPlan::Use> SymbolicPlan::uses_of(std::size_t block,
                                                         std::size_t instance) const {
  const auto key = [](const Use& use) { return std::pair(use.block, use.instance); };
  const std::pair wanted(block, instance);
  const auto first =
      std::lower_bound(uses_.begin(), uses_.end(), wanted,
                       [&](const Use& use, const auto& it) { return key(use) < it; });
  auto last = first;
  while (last != uses_.end() && key(*last) == wanted) ++last;
  return {first, last};
}

Plan SymbolicPlan::of_rank(std::int64_t destination_rank) const {
  const std::vector<std::int64_t>& ranks = destination_->ranks();
  KIMISYS_CHECK(std::binary_search(ranks.begin(), ranks.end(), destination_rank), kBad,
                "the plan has no destination rank ", destination_rank, "; its ranks are ",
                ranks_text(ranks));
  Part from(*source_);
  std::vector<Step> steps;
  std::size_t base = 0;
  for (const SymbolicLayout::Seat& seat : destination_->seats_of(destination_rank)) {
    const auto [g, m] = member_of_[seat.block][seat.instance];
    const Group& group = groups_[g];
    const Group::Member& member = group.members[m];
    const std::span<const std::size_t> kept = destination_->fragments_of(seat.block, seat.local);
    Reading reading(group, member, from);
    for (const std::size_t i : seat.local < group.steps_to.size()
                                   ? group.steps_to[seat.local]
                                   : std::span<const std::size_t>()) {
      const Step& step = group.plan->steps()[i];
      const auto place = std::lower_bound(kept.begin(), kept.end(), step.destination_fragment);
      steps.push_back({reading.index(step.source_fragment),
                       base + static_cast<std::size_t>(place - kept.begin()), step.region});
    }
    base += kept.size();
  }
  // The lowest source rank writes the padding: the shares of a slice must know which it is.
  if (!source_->ranks().empty()) from.add_place(source_->ranks().front());
  return {from.layout(), std::make_shared<const Layout>(destination_->of_rank(destination_rank)),
          std::move(steps)};
}

std::ostream& operator<<(std::ostream& stream, const SymbolicPlan& plan) {
  return stream << "SymbolicPlan(" << plan.proof().copies << " copies, "
                << plan.proof().copied_bytes << " bytes in " << plan.groups().size()
                << " groups, ranks " << ranks_text(plan.source().ranks()) << " -> ranks "
                << ranks_text(plan.destination().ranks()) << ")";
}

}  // namespace kimisys::reshard
