// What one source rank writes of a symbolic plan, and who sends how much to whom.
#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"
#include "reshard/symbolic_part.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

void add_padding(const Layout& block, std::size_t number, std::size_t instance, Part& to) {
  for (std::size_t i = 0; i < block.padding().size(); ++i) {
    if (block.padding()[i].nbytes > 0) to.add_padding(number, instance, i);
  }
}

}  // namespace

std::vector<SymbolicPlan::Service> SymbolicPlan::services_of(std::int64_t source_rank) const {
  std::vector<Service> services;
  for (const SymbolicLayout::Seat& seat : source_->seats_of(source_rank)) {
    for (const Use& use : uses_of(seat.block, seat.instance)) {
      const Group& group = groups_[use.group];
      const std::size_t local = group.first[use.slot] + seat.local;
      if (seat.local >= local_ranks(*source_->blocks()[seat.block].layout)) continue;
      if (local >= group.steps_from.size() || group.steps_from[local].empty()) continue;
      services.push_back({use.group, use.member, local});
    }
  }
  std::sort(services.begin(), services.end());
  return services;
}

Plan SymbolicPlan::of_source(std::int64_t source_rank) const {
  const std::vector<std::int64_t>& ranks = source_->ranks();
  KIMISYS_CHECK(std::binary_search(ranks.begin(), ranks.end(), source_rank), kBad,
                "the plan has no source rank ", source_rank, "; its ranks are ", ranks_text(ranks));
  const bool padded = source_rank == ranks.front();
  const std::vector<Service> services = services_of(source_rank);
  Part from(*source_);
  Part to(*destination_);
  std::vector<Step> steps;
  auto next = services.begin();
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    const Layout& block = *destination_->blocks()[group.block].layout;
    for (std::size_t m = 0; m < group.members.size(); ++m) {
      const bool serves = next != services.end() && next->group == g && next->member == m;
      if (!serves && (!padded || block.padding().empty())) continue;
      const Group::Member& member = group.members[m];
      if (padded) add_padding(block, group.block, member.instance, to);
      std::vector<std::size_t> taken;
      for (; next != services.end() && next->group == g && next->member == m; ++next) {
        const auto own = group.steps_from[next->local];
        taken.insert(taken.end(), own.begin(), own.end());
      }
      std::sort(taken.begin(), taken.end());
      Reading reading(group, member, from);
      std::map<std::size_t, std::size_t> written;
      for (const std::size_t i : taken) {
        const Step& step = group.plan->steps()[i];
        const auto [at, is_new] = written.emplace(step.destination_fragment, 0);
        if (is_new) at->second = to.add(group.block, member.instance, step.destination_fragment);
        steps.push_back({reading.index(step.source_fragment), at->second, step.region});
      }
    }
  }
  // The lowest rank writes the padding: a share must know whether that is its own.
  from.add_place(ranks.front());
  from.add_place(source_rank);
  return {from.layout(), to.layout(), std::move(steps), source_rank};
}

std::vector<SymbolicPlan::Traffic> SymbolicPlan::traffic() const {
  // Per group: each pair of local ranks once. Then row by row of source ranks, so that no table of
  // all pairs is needed.
  struct Cell {
    std::size_t to;
    std::int64_t bytes;
    std::int64_t copies;
  };
  std::vector<std::vector<std::vector<Cell>>> rows(groups_.size());
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    const Layout& block = *destination_->blocks()[group.block].layout;
    std::vector<Cell> row(local_ranks(block));
    for (std::size_t local = 0; local < group.steps_from.size(); ++local) {
      std::fill(row.begin(), row.end(), Cell{});
      for (const std::size_t i : group.steps_from[local]) {
        const Step& step = group.plan->steps()[i];
        const std::size_t to = step.destination_fragment;
        Cell& cell = row[static_cast<std::size_t>(block.fragments()[to].rank)];
        cell.bytes += step.region.elements() * itemsize(block.tensors()[block.tensor_of(to)].dtype);
        cell.copies += 1;
      }
      std::vector<Cell>& kept = rows[g].emplace_back();
      for (std::size_t to = 0; to < row.size(); ++to) {
        if (row[to].copies > 0) kept.push_back({to, row[to].bytes, row[to].copies});
      }
    }
  }
  const std::vector<std::int64_t>& ranks = destination_->ranks();
  std::vector<Traffic> table;
  std::vector<Cell> row(ranks.size());
  for (const std::int64_t source_rank : source_->ranks()) {
    std::fill(row.begin(), row.end(), Cell{});
    for (const Service& it : services_of(source_rank)) {
      const Group& group = groups_[it.group];
      const Instance& instance =
          destination_->blocks()[group.block].instances[group.members[it.member].instance];
      for (const Cell& cell : rows[it.group][it.local]) {
        const auto at = std::lower_bound(ranks.begin(), ranks.end(), instance.ranks[cell.to]);
        Cell& sum = row[static_cast<std::size_t>(at - ranks.begin())];
        sum.bytes += cell.bytes;
        sum.copies += cell.copies;
      }
    }
    for (std::size_t to = 0; to < row.size(); ++to) {
      if (row[to].copies == 0) continue;
      table.push_back({source_rank, ranks[to], row[to].bytes, row[to].copies});
    }
  }
  return table;
}

}  // namespace kimisys::reshard
