#include "reshard/plan.h"

#include <algorithm>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "reshard/box.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

// Where the source holds one tensor: its distinct regions, and for each the fragments that hold it.
class Holders {
 public:
  Holders(const Layout& source, std::vector<std::size_t> fragments)
      : owners_(group(source, std::move(fragments))), index_(regions(source, owners_)) {}

  // Groups of replicas, one group for each distinct region that overlaps `box`.
  std::vector<const std::vector<std::size_t>*> overlapping(const Region& box) const {
    std::vector<std::size_t> found = index_.overlapping(box);
    std::sort(found.begin(), found.end());
    std::vector<const std::vector<std::size_t>*> groups;
    for (const std::size_t i : found) groups.push_back(&owners_[i]);
    return groups;
  }

 private:
  using Groups = std::vector<std::vector<std::size_t>>;

  static Groups group(const Layout& source, std::vector<std::size_t> fragments) {
    const auto region = [&](std::size_t i) -> const Region& {
      return source.fragments()[i].region;
    };
    std::stable_sort(fragments.begin(), fragments.end(), [&](std::size_t a, std::size_t b) {
      return std::tie(region(a).offset, region(a).extent) <
             std::tie(region(b).offset, region(b).extent);
    });
    Groups groups;
    for (const std::size_t i : fragments) {
      if (groups.empty() || region(groups.back().front()) != region(i)) groups.emplace_back();
      groups.back().push_back(i);
    }
    return groups;
  }

  static std::vector<const Region*> regions(const Layout& source, const Groups& groups) {
    std::vector<const Region*> list;
    for (const auto& group : groups) list.push_back(&source.fragments()[group.front()].region);
    return list;
  }

  Groups owners_;
  BoxIndex index_;
};

class Planner {
 public:
  Planner(const Layout& source, const Layout& destination)
      : source_(source), destination_(destination), held_(fragments_by_tensor(source)) {}

  std::vector<Step> run() {
    const auto wanted = fragments_by_tensor(destination_);
    for (std::size_t t = 0; t < wanted.size(); ++t) {
      const Tensor& tensor = destination_.tensors()[t];
      const auto held = source_.find_tensor(tensor.name);
      if (held) check_shapes(source_.tensors()[*held], tensor);
      if (wanted[t].empty()) continue;
      KIMISYS_CHECK(held, kBad, "tensor '", tensor.name, "' is wanted by destination rank ",
                    destination_.fragments()[wanted[t].front()].rank,
                    " but the source layout does not know it; its ranks are ",
                    ranks_text(source_.ranks()), ". Add it to the source or map its name");
      check_cast(source_.tensors()[*held], tensor, wanted[t]);
      join(*held, wanted[t]);
    }
    return std::move(steps_);
  }

 private:
  // One replica, and how willing we are to read it: lower is better, compared in this order.
  struct Choice {
    std::int64_t distance;
    std::int64_t bytes;
    std::int64_t minus_overlap;
    std::size_t fragment;
    auto key() const { return std::tie(distance, bytes, minus_overlap, fragment); }
    bool operator<(const Choice& other) const { return key() < other.key(); }
  };

  void check_shapes(const Tensor& held, const Tensor& wanted) const {
    KIMISYS_CHECK(held.shape == wanted.shape, kBad, "tensor '", wanted.name, "' has shape ",
                  to_string(held.shape), " in the source (ranks ", ranks_text(source_.ranks()),
                  ") and ", to_string(wanted.shape), " in the destination (ranks ",
                  ranks_text(destination_.ranks()),
                  "); both sides must use the checkpoint's coordinates");
  }

  void check_cast(const Tensor& held, const Tensor& wanted,
                  const std::vector<std::size_t>& fragments) const {
    const Fragment& first = destination_.fragments()[fragments.front()];
    KIMISYS_CHECK(can_cast(held.dtype, wanted.dtype), kBad, "tensor '", wanted.name, "' region ",
                  first.region, " for destination rank ", first.rank, " would need a cast from ",
                  dtype_name(held.dtype), " to ", dtype_name(wanted.dtype),
                  "; supported are equal dtypes, float32 -> bfloat16 and bfloat16 -> float32");
  }

  void join(std::size_t tensor, const std::vector<std::size_t>& wanted) {
    KIMISYS_CHECK(!held_[tensor].empty(), kBad, "tensor '", source_.tensors()[tensor].name,
                  "' region ", destination_.fragments()[wanted.front()].region,
                  " for destination rank ", destination_.fragments()[wanted.front()].rank,
                  " has no source: no source rank of ", ranks_text(source_.ranks()),
                  " holds any part of it");
    const Holders holders(source_, held_[tensor]);
    const std::int64_t item = itemsize(source_.tensors()[tensor].dtype);
    for (const std::size_t want : wanted) fill(want, holders, item);
  }

  // Covers one destination fragment, best replica first; each next one fills what is still open.
  void fill(std::size_t want, const Holders& holders, std::int64_t item) {
    const Fragment& fragment = destination_.fragments()[want];
    std::vector<Choice> choices;
    for (const auto* owners : holders.overlapping(fragment.region)) {
      choices.push_back(best_of(*owners, fragment));
    }
    std::sort(choices.begin(), choices.end());
    std::vector<Region> open = {fragment.region};
    for (const Choice& choice : choices) {
      const Fragment& held = source_.fragments()[choice.fragment];
      std::vector<Region> still_open;
      for (const Region& box : open) {
        const auto common = intersect(box, held.region);
        if (!common) {
          still_open.push_back(box);
          continue;
        }
        subtract(box, *common, still_open);
        bytes_from_[held.rank] += common->elements() * item;
        steps_.push_back({choice.fragment, want, *common});
      }
      open = std::move(still_open);
      if (open.empty()) return;
    }
    report_missing(fragment, open.front());
  }

  Choice best_of(const std::vector<std::size_t>& owners, const Fragment& wanted) {
    const Place here = destination_.place_of(wanted.rank);
    const std::int64_t overlap =
        intersect(source_.fragments()[owners.front()].region, wanted.region)->elements();
    Choice best{3, 0, 0, 0};
    for (const std::size_t owner : owners) {
      const std::int64_t rank = source_.fragments()[owner].rank;
      const Place there = source_.place_of(rank);
      const std::int64_t distance = there.node != here.node ? 2 : there.device != here.device;
      best = std::min(best, Choice{distance, bytes_from_[rank], -overlap, owner});
    }
    return best;
  }

  void report_missing(const Fragment& wanted, const Region& open) const {
    std::vector<std::int64_t> ranks;
    for (const std::size_t i : held_[*source_.find_tensor(wanted.tensor)]) {
      ranks.push_back(source_.fragments()[i].rank);
    }
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
    fail(kBad, "tensor '", wanted.tensor, "' region ", open, " for destination rank ", wanted.rank,
         " has no source: source ranks ", ranks_text(ranks),
         " hold parts of the tensor, but not this one. Add the missing source rank's layout");
  }

  const Layout& source_;
  const Layout& destination_;
  std::vector<std::vector<std::size_t>> held_;
  std::unordered_map<std::int64_t, std::int64_t> bytes_from_;
  std::vector<Step> steps_;
};

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
  std::vector<Step> steps = Planner(*source, *destination).run();
  return {std::move(source), std::move(destination), std::move(steps)};
}

}  // namespace kimisys::reshard
