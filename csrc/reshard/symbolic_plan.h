// Plans between symbolic layouts: what repeats is planned and proven once, and instantiated.
//
// Each instance of a destination block is joined with the source instances that hold its tensors.
// Instances of one block that find the same source blocks, the same tensors in them and the same
// neighbourhood of ranks form a group. A group is planned as an ordinary plan between two template
// layouts: the source blocks side by side (local ranks counted on from one to the next), and the
// destination block. Instantiating is sound because SymbolicLayout lets no tensor and no buffer
// stand in two instances: the instances' copies cannot meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/lists.h"
#include "reshard/plan.h"
#include "reshard/symbolic.h"

namespace kimisys::reshard {

// Instances of one destination block that are planned together.
struct Group {
  // A slot is one source instance that serves an instance of the destination.
  struct Member {
    std::size_t instance = 0;            // of the destination block
    std::vector<std::size_t> instances;  // of each slot's source block
  };
  struct Origin {
    std::size_t slot = 0;
    std::size_t fragment = 0;  // in the slot's source block
  };

  std::size_t block = 0;             // of the destination
  std::vector<std::size_t> sources;  // the source block of each slot
  std::vector<std::size_t> first;    // the template's local rank of each slot's local rank 0
  std::vector<Member> members;
  std::shared_ptr<const Layout> source;  // the template; the destination's is the block's layout
  std::vector<Origin> origins;           // of the template's source fragments
  std::shared_ptr<const Plan> plan;
  Lists steps_from;  // by local source rank of the template
  Lists steps_to;    // by local destination rank
};

class SymbolicPlan {
 public:
  // Joins, plans and proves. Raises PlanError (see make_plan), naming tensor, region and ranks.
  SymbolicPlan(std::shared_ptr<const SymbolicLayout> source,
               std::shared_ptr<const SymbolicLayout> destination);

  const SymbolicLayout& source() const { return *source_; }
  const SymbolicLayout& destination() const { return *destination_; }
  const std::shared_ptr<const SymbolicLayout>& shared_source() const { return source_; }
  const std::shared_ptr<const SymbolicLayout>& shared_destination() const { return destination_; }
  const std::vector<Group>& groups() const { return groups_; }

  // Of the whole model: sums over the instances of what was proven once for each group.
  const Proof& proof() const { return proof_; }

  // The part that fills one destination rank, with those source fragments that it reads. PlanError
  // if the destination has no such rank.
  Plan of_rank(std::int64_t destination_rank) const;

  // The share that one source rank writes: its layouts hold the fragments that it reads and writes,
  // and the sizes of their buffers. The lowest rank's share writes all padding. PlanError if the
  // source has no such rank.
  Plan of_source(std::int64_t source_rank) const;

  // One row for each pair of ranks with copies, by source rank, then destination rank. Bytes are
  // those written at the destination.
  struct Traffic {
    std::int64_t source_rank = 0;
    std::int64_t destination_rank = 0;
    std::int64_t bytes = 0;
    std::int64_t copies = 0;
    bool operator==(const Traffic&) const = default;
  };
  std::vector<Traffic> traffic() const;

  // The compact form (see bytes.cpp): equal values give equal bytes. from_bytes treats them as
  // hostile: whatever is malformed raises LayoutError or PlanError, and the
  // steps are proven again.
  std::string to_bytes() const;
  static SymbolicPlan from_bytes(std::string_view bytes);

  // 32 hexadecimal digits that stand for to_bytes().
  std::string fingerprint() const;

 private:
  // With plans that are proven already.
  SymbolicPlan(std::shared_ptr<const SymbolicLayout> source,
               std::shared_ptr<const SymbolicLayout> destination, std::vector<Group> groups);

  struct Use {  // one slot of one member, by the source instance that fills it
    std::size_t block = 0;
    std::size_t instance = 0;
    std::size_t group = 0;
    std::size_t member = 0;
    std::size_t slot = 0;
  };

  struct Service {  // a member to which one source rank gives something
    std::size_t group = 0;
    std::size_t member = 0;
    std::size_t local = 0;  // the rank's number in the source's template
    auto operator<=>(const Service&) const = default;
  };

  void index();
  std::span<const Use> uses_of(std::size_t block, std::size_t instance) const;
  std::vector<Service> services_of(std::int64_t source_rank) const;

  std::shared_ptr<const SymbolicLayout> source_;
  std::shared_ptr<const SymbolicLayout> destination_;
  std::vector<Group> groups_;
  std::vector<Use> uses_;  // by (block, instance) of the source
  // (group, member) of each destination block's instances
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> member_of_;
  Proof proof_;
};

// The groups, with templates but without plans. Raises PlanError for a tensor that the source
// lacks.
std::vector<Group> join(const SymbolicLayout& source, const SymbolicLayout& destination);

std::ostream& operator<<(std::ostream& stream, const SymbolicPlan& plan);

}  // namespace kimisys::reshard
