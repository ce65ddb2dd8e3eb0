#include "broadcast/scatter.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "base/error.h"
#include "broadcast/scatter_elements.h"
#include "reshard/memory.h"

namespace kimisys::broadcast {
namespace {

using reshard::Layout;
using reshard::Memories;
using reshard::Memory;
using reshard::Plan;
using reshard::Step;
using reshard::Tensor;

// Bytes between two needed parts of a payload that cost less to read than a range of their own.
constexpr std::int64_t kGap = 64;

void check_plan(const Plan& plan) {
  const std::vector<reshard::Buffer>& to = plan.destination().buffers();
  KIMISYS_CHECK(to.empty() || to.front().rank == to.back().rank, ErrorCode::kLayout,
                "the plan fills buffers of rank ", to.front().rank, " and of rank ", to.back().rank,
                "; take the part of one engine rank");
  const std::vector<reshard::Buffer>& from = plan.source().buffers();
  for (std::size_t i = 1; i < from.size(); ++i) {
    KIMISYS_CHECK(from[i].rank != from[i - 1].rank, ErrorCode::kLayout, "rank ", from[i].rank,
                  " of the source has the buffers '", from[i - 1].name, "' and '", from[i].name,
                  "'; a snapshot is one buffer per rank, see snapshot_layout");
  }
  for (const Step& step : plan.steps()) {
    const Layout& there = plan.source();
    const Layout& here = plan.destination();
    const Tensor& read = there.tensors()[there.tensor_of(step.source_fragment)];
    const Tensor& held = here.tensors()[here.tensor_of(step.destination_fragment)];
    KIMISYS_CHECK(read.dtype == held.dtype, ErrorCode::kLayout, "tensor '", read.name,
                  "' is published as ", dtype_name(read.dtype), ", the destination holds ",
                  dtype_name(held.dtype),
                  "; changed elements are written as they are: publish with "
                  "the destination's dtype");
  }
}

std::string chosen_implementation(std::string_view asked) {
  if (asked.empty()) {
    const char* forced = std::getenv("KIMISYS_BROADCAST_IMPLEMENTATION");
    asked = forced != nullptr ? forced : "";
  }
  if (asked.empty()) return std::string(element_kernels().front().name);
  std::string known;
  for (const std::string_view name : scatter_implementations()) {
    if (name == asked) return std::string(name);
    known.append(known.empty() ? "" : ", ").append(name);
  }
  fail(ErrorCode::kLayout, "unknown implementation '", asked, "' of the scatter; this machine has ",
       known);
}

}  // namespace

std::vector<std::string_view> scatter_implementations() {
  std::vector<std::string_view> names;
  for (const ElementKernel& kernel : element_kernels()) names.push_back(kernel.name);
  return names;
}

Scatter::Scatter(const Plan& plan, std::span<const Layout> rounds, std::string_view implementation)
    : source_(plan.shared_source()),
      destination_(plan.shared_destination()),
      rounds_(rounds.size()),
      written_(plan.destination().buffers().size(), false),
      fills_padding_(plan.fills_padding()),
      implementation_(chosen_implementation(implementation)) {
  check_plan(plan);
  const auto counted = counted_boxes(*destination_, rounds);
  for (const Step& step : plan.steps()) {
    written_[destination_->buffer_of(step.destination_fragment)] = true;
  }
  for (std::size_t i = 0; fills_padding_ && i < destination_->padding().size(); ++i) {
    if (destination_->padding()[i].nbytes > 0) written_[destination_->buffer_of_padding(i)] = true;
  }
  for (const std::int64_t rank : source_->ranks()) {
    auto made = std::make_shared<const Targets>(plan, rank, counted, sums_);
    if (!made->needed().empty()) targets_.push_back(std::move(made));
  }
}

std::vector<std::int64_t> Scatter::ranks() const {
  std::vector<std::int64_t> ranks;
  for (const auto& targets : targets_) ranks.push_back(targets->rank());
  return ranks;
}

const std::shared_ptr<const Targets>& Scatter::targets(std::int64_t rank) const {
  const auto found = std::find_if(targets_.begin(), targets_.end(),
                                  [rank](const auto& targets) { return targets->rank() == rank; });
  KIMISYS_CHECK(found != targets_.end(), ErrorCode::kLayout, "nothing is read of trainer rank ",
                rank, "; the ranks that are read are ", reshard::ranks_text(ranks()));
  return *found;
}

const std::vector<std::uint32_t>& Scatter::blocks(std::int64_t rank) const {
  return targets(rank)->needed();
}

std::vector<Range> Scatter::payload(std::int64_t rank, const Record& record) const {
  const Targets& targets = *this->targets(rank);
  const std::vector<std::uint64_t> offsets = record.block_offsets(targets.blocks().chunk_begins());
  std::vector<Range> ranges;
  for (const std::uint32_t block : targets.needed()) {
    const Descriptor descriptor = Descriptor::of(record.descriptors[block]);
    if (descriptor.nbytes == 0) continue;
    ranges.push_back({static_cast<std::int64_t>(offsets[block]), descriptor.nbytes});
  }
  return merge_ranges(std::move(ranges), kGap);
}

Staged Scatter::stage(std::int64_t rank, const Record& record,
                      std::span<const std::byte> payload) const {
  Staged staged;
  staged.targets_ = targets(rank);
  const Targets& targets = *staged.targets_;
  const std::vector<Range> ranges = this->payload(rank, record);
  const std::vector<std::uint64_t> offsets = record.block_offsets(targets.blocks().chunk_begins());
  std::vector<std::int64_t> starts;  // of each range in `payload`
  std::int64_t total = 0;
  for (const Range& range : ranges) {
    starts.push_back(total);
    total += range.nbytes;
  }
  KIMISYS_CHECK(std::cmp_equal(payload.size(), total), ErrorCode::kSnapshot,
                "of the record of version ", record.version, " of trainer rank ", rank, " ", total,
                " bytes of payload are needed, got ", payload.size(),
                "; pass the bytes of payload(), one range after the other");
  for (std::size_t place = 0; place < targets.needed().size(); ++place) {
    const std::uint32_t block = targets.needed()[place];
    const Descriptor descriptor = Descriptor::of(record.descriptors[block]);
    check_descriptor(descriptor, targets.block(place).region.elements(),
                     itemsize(targets.tensor(place).dtype));
    if (descriptor.kind == Kind::kSame) continue;
    if (descriptor.nbytes == 0) {
      staged.references_.push_back(block);
      continue;
    }
    const auto offset = static_cast<std::int64_t>(offsets[block]);
    const auto after =
        std::upper_bound(ranges.begin(), ranges.end(), offset,
                         [](std::int64_t at, const Range& range) { return at < range.offset; });
    const auto index = static_cast<std::size_t>(after - ranges.begin()) - 1;
    const auto begin = static_cast<std::size_t>(starts[index] + offset - ranges[index].offset);
    staged.changes_.push_back({place, descriptor, payload.subspan(begin, descriptor.nbytes)});
  }
  return staged;
}

void Scatter::check_staged(std::span<const Staged* const> staged) const {
  std::vector<std::int64_t> ranks;
  for (const Staged* each : staged) {
    ranks.push_back(each->rank());
    KIMISYS_CHECK(each->targets() == targets(each->rank()), ErrorCode::kLayout,
                  "the record of rank ", each->rank(),
                  " was staged by another Scatter; stage it by this one");
  }
  std::sort(ranks.begin(), ranks.end());
  const auto twice = std::adjacent_find(ranks.begin(), ranks.end());
  KIMISYS_CHECK(twice == ranks.end(), ErrorCode::kLayout, "two records of trainer rank ", *twice,
                " at once: the second one changes what the first one wrote; apply one before the "
                "other is measured");
}

std::vector<Memory> Scatter::checked(const Memories& destinations, bool all) const {
  std::vector<bool> needed = written_;
  for (std::size_t i = 0; !all && i < needed.size(); ++i) {
    needed[i] = needed[i] && i < destinations.size() && destinations[i].has_value();
  }
  std::vector<Memory> memory =
      reshard::needed_memory(*destination_, destinations, needed, reshard::Side::kDestination);
  reshard::check_no_overlap(*source_, {}, *destination_, memory);
  return memory;
}

Sums Scatter::spread(std::span<const std::uint64_t> by_sum) const {
  const std::size_t tensors = source_->tensors().size();
  Sums sums(rounds_ * tensors, 0);
  for (std::size_t i = 0; i < by_sum.size(); ++i) {
    for (const std::size_t round : sums_[i].rounds) {
      sums[round * tensors + sums_[i].tensor] += by_sum[i];
    }
  }
  return sums;
}

}  // namespace kimisys::broadcast
