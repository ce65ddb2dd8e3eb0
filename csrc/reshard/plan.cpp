#include "reshard/plan.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "reshard/box.h"
#include "reshard/choice.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

}  // namespace

Plan::Plan(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> destination,
           std::vector<Step> steps)
    : Plan(std::move(source), std::move(destination), std::move(steps), std::nullopt) {}

Plan::Plan(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> destination,
           std::vector<Step> steps, std::optional<std::int64_t> share_of)
    : source_(std::move(source)),
      destination_(std::move(destination)),
      steps_(std::move(steps)),
      share_of_(share_of),
      proof_(prove(*source_, *destination_, steps_, share_of_)) {}

Copy Plan::copy(std::size_t step) const {
  const Step& it = steps_.at(step);
  const Fragment& from = source_->fragments()[it.source_fragment];
  const Fragment& to = destination_->fragments()[it.destination_fragment];
  return {.source_fragment = it.source_fragment,
          .destination_fragment = it.destination_fragment,
          .tensor = to.tensor,
          .region = it.region,
          .source_rank = from.rank,
          .source_buffer = from.buffer,
          .source_offset = byte_offset_at(from, it.region.offset),
          .source_strides = from.byte_strides,
          .source_dtype = source_->tensors()[source_->tensor_of(it.source_fragment)].dtype,
          .destination_rank = to.rank,
          .destination_buffer = to.buffer,
          .destination_offset = byte_offset_at(to, it.region.offset),
          .destination_strides = to.byte_strides,
          .destination_dtype =
              destination_->tensors()[destination_->tensor_of(it.destination_fragment)].dtype};
}

Plan Plan::of_rank(std::int64_t destination_rank) const {
  const std::vector<std::int64_t> ranks = destination_->ranks();
  KIMISYS_CHECK(std::binary_search(ranks.begin(), ranks.end(), destination_rank), kBad,
                "the plan has no destination rank ", destination_rank, "; its ranks are ",
                ranks_text(ranks));
  // of_rank keeps the order of fragments, so a fragment's new index is its rank among the kept.
  std::unordered_map<std::size_t, std::size_t> new_index;
  for (std::size_t i = 0; i < destination_->fragments().size(); ++i) {
    if (destination_->fragments()[i].rank == destination_rank)
      new_index.emplace(i, new_index.size());
  }
  std::vector<Step> steps;
  for (const Step& step : steps_) {
    const auto kept = new_index.find(step.destination_fragment);
    if (kept == new_index.end()) continue;
    steps.push_back({step.source_fragment, kept->second, step.region});
  }
  return {source_, std::make_shared<const Layout>(destination_->of_rank(destination_rank)),
          std::move(steps), share_of_};
}

Plan Plan::of_source(std::int64_t source_rank) const {
  const std::vector<std::int64_t> ranks = source_->ranks();
  KIMISYS_CHECK(std::binary_search(ranks.begin(), ranks.end(), source_rank), kBad,
                "the plan has no source rank ", source_rank, "; its ranks are ", ranks_text(ranks));
  KIMISYS_CHECK(!share_of_ || share_of_ == source_rank, kBad, "the plan is already the share of ",
                "source rank ", share_of_.value_or(0), ": take that of ", source_rank,
                " from the whole plan");
  std::vector<Step> steps;
  for (const Step& step : steps_) {
    if (source_->fragments()[step.source_fragment].rank == source_rank) steps.push_back(step);
  }
  return {source_, destination_, std::move(steps), source_rank};
}

Plan make_plan(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> destination) {
  const auto places = [](const Layout& layout) {
    std::vector<Place> list;
    for (const Buffer& buffer : layout.buffers()) {
      if (list.empty() || list.back().rank != buffer.rank) {
        list.push_back(layout.place_of(buffer.rank));
      }
    }
    return list;
  };
  Loads loads;
  std::vector<Step> steps =
      make_steps(*source, *destination, {{places(*source), places(*destination)}}, loads);
  return {std::move(source), std::move(destination), std::move(steps)};
}

}  // namespace kimisys::reshard
