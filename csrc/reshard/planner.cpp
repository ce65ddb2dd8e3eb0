// The planner: an interval join per tensor, largest overlap first, and a choice among replicas.
#include <algorithm>
#include <compare>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/lists.h"
#include "reshard/box.h"
#include "reshard/choice.h"
#include "reshard/plan.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

// Ranks that have buffers, in ascending order, and the place of each buffer's rank among them.
struct Ranks {
  explicit Ranks(const Layout& layout) {
    for (const Buffer& buffer : layout.buffers()) {
      if (ranks.empty() || ranks.back() != buffer.rank) ranks.push_back(buffer.rank);
      of_buffer.push_back(ranks.size() - 1);
    }
  }
  std::vector<std::int64_t> ranks;
  std::vector<std::size_t> of_buffer;
};

Lists by_tensor(const Layout& layout) {
  return {layout.tensors().size(), layout.fragments().size(), [&](std::size_t i) {
            return layout.fragments()[i].region.empty()
                       ? -1
                       : static_cast<std::int64_t>(layout.tensor_of(i));
          }};
}

// Where the source holds one tensor: its distinct regions, and for each the fragments that hold it.
class Holders {
 public:
  Holders(const Layout& source, std::span<std::size_t> fragments)
      : source_(source), fragments_(fragments) {
    const auto less = [&](std::size_t a, std::size_t b) {
      const auto order = region(a).offset <=> region(b).offset;
      return order != 0 ? order < 0 : region(a).extent < region(b).extent;
    };
    if (!std::is_sorted(fragments.begin(), fragments.end(), less)) {
      std::stable_sort(fragments.begin(), fragments.end(), less);
    }
    for (std::size_t i = 0; i < fragments.size(); ++i) {
      if (i == 0 || region(fragments[i]) != region(fragments[i - 1])) first_.push_back(i);
    }
    first_.push_back(fragments.size());
    if (size() <= kFew) return;
    std::vector<const Region*> regions;
    for (std::size_t i = 0; i < size(); ++i) regions.push_back(&region(fragments_[first_[i]]));
    index_.emplace(std::move(regions));
  }

  std::size_t size() const { return first_.size() - 1; }

  // The replicas of one distinct region, in layout order.
  std::span<const std::size_t> owners(std::size_t i) const {
    return fragments_.subspan(first_[i], first_[i + 1] - first_[i]);
  }
  const Region& region_of(std::size_t i) const { return region(fragments_[first_[i]]); }

  // The distinct regions that overlap `box`, ascending.
  void overlapping(const Region& box, std::vector<std::size_t>& found) const {
    found.clear();
    if (index_) {
      found = index_->overlapping(box);
      std::sort(found.begin(), found.end());
      return;
    }
    for (std::size_t i = 0; i < size(); ++i) {
      if (overlap(region_of(i), box)) found.push_back(i);
    }
  }

 private:
  static constexpr std::size_t kFew = 8;  // looking at so many is faster than an index

  const Region& region(std::size_t fragment) const { return source_.fragments()[fragment].region; }

  const Layout& source_;
  std::span<std::size_t> fragments_;
  std::vector<std::size_t> first_;
  std::optional<BoxIndex> index_;
};

class Planner {
 public:
  Planner(const Layout& source, const Layout& destination, const std::vector<Placement>& instances,
          Loads& loads)
      : source_(source),
        destination_(destination),
        placement_(instances.front()),
        chooser_(instances, loads),
        held_(by_tensor(source)),
        wanted_(by_tensor(destination)),
        source_rank_(Ranks(source).of_buffer),
        destination_rank_(Ranks(destination).of_buffer) {}

  std::vector<Step> run() {
    steps_.reserve(destination_.fragments().size());
    for (std::size_t t = 0; t < wanted_.size(); ++t) {
      const Tensor& tensor = destination_.tensors()[t];
      const auto held = source_.find_tensor(tensor.name);
      if (held) check_shapes(source_.tensors()[*held], tensor);
      if (wanted_[t].empty()) continue;
      KIMISYS_CHECK(held, kBad, "tensor '", tensor.name, "' is wanted by destination rank ",
                    destination_.fragments()[wanted_[t].front()].rank,
                    " but the source layout does not know it; its ranks are ",
                    ranks_text(source_.ranks()), ". Add it to the source or map its name");
      check_cast(source_.tensors()[*held], tensor, wanted_[t]);
      join(*held, wanted_[t]);
    }
    chooser_.choose(choices_, candidates_);
    for (const OpenChoice& choice : choices_) {
      steps_[choice.step].source_fragment = candidates_[choice.chosen].fragment;
    }
    return std::move(steps_);
  }

 private:
  // One distinct region of the source that overlaps what is wanted: the nearest first, then the one
  // that serves most.
  struct Offer {
    int distance;
    std::int64_t minus_overlap;
    std::size_t holder;
    auto operator<=>(const Offer&) const = default;
  };

  void check_shapes(const Tensor& held, const Tensor& wanted) const {
    KIMISYS_CHECK(held.shape == wanted.shape, kBad, "tensor '", wanted.name, "' has shape ",
                  to_string(held.shape), " in the source (ranks ", ranks_text(source_.ranks()),
                  ") and ", to_string(wanted.shape), " in the destination (ranks ",
                  ranks_text(destination_.ranks()),
                  "); both sides must use the checkpoint's coordinates");
  }

  void check_cast(const Tensor& held, const Tensor& wanted,
                  std::span<const std::size_t> fragments) const {
    const Fragment& first = destination_.fragments()[fragments.front()];
    KIMISYS_CHECK(can_cast(held.dtype, wanted.dtype), kBad, "tensor '", wanted.name, "' region ",
                  first.region, " for destination rank ", first.rank, " would need a cast from ",
                  dtype_name(held.dtype), " to ", dtype_name(wanted.dtype),
                  "; supported are equal dtypes, float32 -> bfloat16 and bfloat16 -> float32");
  }

  void join(std::size_t tensor, std::span<const std::size_t> wanted) {
    const Fragment& first = destination_.fragments()[wanted.front()];
    KIMISYS_CHECK(!held_[tensor].empty(), kBad, "tensor '", first.tensor, "' region ", first.region,
                  " for destination rank ", first.rank, " has no source: no source rank of ",
                  ranks_text(source_.ranks()), " holds any part of it");
    const Holders holders(source_, held_[tensor]);
    const DType dtype = destination_.tensors()[destination_.tensor_of(wanted.front())].dtype;
    equally_far_.assign(holders.size(), std::nullopt);
    for (const std::size_t want : wanted) fill(want, holders, itemsize(dtype));
  }

  // Covers one destination fragment, best offer first; each next one fills what is still open.
  void fill(std::size_t want, const Holders& holders, std::int64_t item) {
    const Region& wanted = destination_.fragments()[want].region;
    holders.overlapping(wanted, found_);
    if (found_.size() == 1 && contains(holders.region_of(found_.front()), wanted)) {
      take(want, wanted, holders, found_.front(), item);
      return;
    }
    offers_.clear();
    for (const std::size_t i : found_) {
      int nearest = 2;
      for (const std::size_t owner : holders.owners(i)) {
        nearest = std::min(nearest, distance_of(owner, want));
      }
      offers_.push_back({nearest, -intersect(holders.region_of(i), wanted)->elements(), i});
    }
    std::sort(offers_.begin(), offers_.end());
    std::vector<Region> open = {wanted};
    std::vector<Region> still_open;
    for (const Offer& offer : offers_) {
      still_open.clear();
      for (const Region& box : open) {
        if (const auto common = intersect(box, holders.region_of(offer.holder))) {
          subtract(box, *common, still_open);
          take(want, *common, holders, offer.holder, item);
        } else {
          still_open.push_back(box);
        }
      }
      std::swap(open, still_open);
      if (open.empty()) return;
    }
    report_missing(destination_.fragments()[want], open.front());
  }

  int distance_of(std::size_t owner, std::size_t want) const {
    return distance(placement_.source[source_rank_[source_.buffer_of(owner)]],
                    placement_.destination[destination_rank_[destination_.buffer_of(want)]]);
  }

  // One step, from the nearest of the replicas; if several are, the choice is left open.
  void take(std::size_t want, const Region& region, const Holders& holders, std::size_t holder,
            std::int64_t item) {
    const std::span<const std::size_t> owners = holders.owners(holder);
    const std::int64_t bytes = region.elements() * item;
    int nearest = 2;
    int farthest = 0;
    for (const std::size_t owner : owners) {
      const int it = distance_of(owner, want);
      nearest = std::min(nearest, it);
      farthest = std::max(farthest, it);
    }
    OpenChoice choice{steps_.size(), candidates_.size(), 0, bytes, nearest == 2, 0};
    if (std::optional<std::size_t>& known = equally_far_[holder]; nearest == farthest) {
      // All replicas are candidates: listed once, however many fragments want them.
      if (!known) known = add_candidates(owners, [](std::size_t) { return true; });
      choice.first = *known;
      choice.count = owners.size();
    } else {
      add_candidates(owners,
                     [&](std::size_t owner) { return distance_of(owner, want) == nearest; });
      choice.count = candidates_.size() - choice.first;
    }
    const Candidate& first = candidates_[choice.first];
    steps_.push_back({first.fragment, want, region});
    if (choice.count == 1) {
      chooser_.add(first.rank, bytes, choice.crosses);
    } else {
      choices_.push_back(choice);
    }
  }

  template <typename Which>
  std::size_t add_candidates(std::span<const std::size_t> owners, Which which) {
    const std::size_t first = candidates_.size();
    for (const std::size_t owner : owners) {
      if (which(owner)) candidates_.push_back({owner, source_rank_[source_.buffer_of(owner)]});
    }
    return first;
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
  const Placement& placement_;
  Chooser chooser_;
  Lists held_;
  Lists wanted_;
  std::vector<std::size_t> source_rank_;  // by buffer
  std::vector<std::size_t> destination_rank_;
  std::vector<Step> steps_;
  std::vector<OpenChoice> choices_;
  std::vector<Candidate> candidates_;
  // Of the tensor at hand, by holder: where all replicas are listed.
  std::vector<std::optional<std::size_t>> equally_far_;
  std::vector<std::size_t> found_;
  std::vector<Offer> offers_;
};

}  // namespace

std::vector<Step> make_steps(const Layout& source, const Layout& destination,
                             const std::vector<Placement>& instances, Loads& loads) {
  return Planner(source, destination, instances, loads).run();
}

}  // namespace kimisys::reshard
