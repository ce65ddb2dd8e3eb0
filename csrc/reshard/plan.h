// From two layouts to the copies that fill one from the other, with the proof that every
// destination byte is written exactly once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/layout.h"

namespace kimisys::reshard {

// The compact form of one copy: which fragments, and which region of the tensor. Everything else
// follows from the two layouts.
struct Step {
  std::size_t source_fragment = 0;
  std::size_t destination_fragment = 0;
  Region region;

  bool operator==(const Step&) const = default;
};

// The spelled-out form of one copy. Offsets are those of the region's corner; strides in bytes.
struct Copy {
  std::size_t source_fragment = 0;
  std::size_t destination_fragment = 0;
  std::string tensor;
  Region region;
  std::int64_t source_rank = 0;
  std::string source_buffer;
  std::int64_t source_offset = 0;
  Dims source_strides;
  DType source_dtype = DType::kFloat32;
  std::int64_t destination_rank = 0;
  std::string destination_buffer;
  std::int64_t destination_offset = 0;
  Dims destination_strides;
  DType destination_dtype = DType::kFloat32;

  bool operator==(const Copy&) const = default;
};

// What prove() established. destination_bytes == copied_bytes + padding_bytes: of the whole
// destination, or of the share of one source rank.
struct Proof {
  std::int64_t destination_bytes = 0;
  std::int64_t copied_bytes = 0;
  std::int64_t padding_bytes = 0;
  std::int64_t copies = 0;

  bool operator==(const Proof&) const = default;
};

// Checks, without the planner's own bookkeeping, that the steps read only what the source holds and
// that steps and padding write each byte of each destination buffer exactly once. Raises PlanError
// naming tensor, region and ranks. With `share_of` the steps are what one source rank writes of a
// whole plan: they may leave bytes to others, but read no other rank and write no byte twice, be it
// through two fragments. What a share does not write need not be in its destination.
Proof prove(const Layout& source, const Layout& destination, const std::vector<Step>& steps,
            std::optional<std::int64_t> share_of = std::nullopt);

class Plan {
 public:
  // Proves the steps: a Plan that exists has passed. Raises PlanError.
  Plan(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> destination,
       std::vector<Step> steps);

  // The same for what one source rank writes of a whole plan (see prove).
  Plan(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> destination,
       std::vector<Step> steps, std::optional<std::int64_t> share_of);

  const Layout& source() const { return *source_; }
  const Layout& destination() const { return *destination_; }
  const std::shared_ptr<const Layout>& shared_source() const { return source_; }
  const std::shared_ptr<const Layout>& shared_destination() const { return destination_; }
  const std::vector<Step>& steps() const { return steps_; }
  const Proof& proof() const { return proof_; }

  // Set for a share: the one source rank whose bytes the plan writes.
  std::optional<std::int64_t> share_of() const { return share_of_; }

  // False for the shares of all source ranks but the lowest: padding too is written once.
  bool fills_padding() const { return !share_of_ || *share_of_ == source_->ranks().front(); }

  // Bytes of tensor elements written at the destination; padding is not counted.
  std::int64_t nbytes() const { return proof_.copied_bytes; }

  Copy copy(std::size_t step) const;

  // The part that fills one destination rank. Raises PlanError if the destination has no such rank.
  Plan of_rank(std::int64_t destination_rank) const;

  // The share that one source rank writes. This plan is proven and each of its steps has one source
  // rank, so the shares of all source ranks together write each destination byte exactly once.
  // Raises PlanError if the source has no such rank.
  Plan of_source(std::int64_t source_rank) const;

  // The compact form (see bytes.cpp): equal values give equal bytes. from_bytes treats them as
  // hostile: whatever is malformed raises LayoutError or PlanError, and the
  // steps are proven again.
  std::string to_bytes() const;
  static Plan from_bytes(std::string_view bytes);

  // 32 hexadecimal digits that stand for to_bytes().
  std::string fingerprint() const;

 private:
  std::shared_ptr<const Layout> source_;
  std::shared_ptr<const Layout> destination_;
  std::vector<Step> steps_;
  std::optional<std::int64_t> share_of_;
  Proof proof_;
};

// Plans an interval join per tensor. Of several replicas those on the same device are preferred,
// then those on the same node; among equally near ones the choice keeps the busiest NIC's bytes low
// (see choice.h), then the busiest rank's. The plan depends on nothing but the layouts. Raises
// PlanError (see prove, and unknown or misshapen tensors, elements without a source, unsupported
// casts).
Plan make_plan(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> destination);

// "[0, 1, 2]", shortened when long.
std::string ranks_text(const std::vector<std::int64_t>& ranks);

std::ostream& operator<<(std::ostream& stream, const Copy& copy);
std::ostream& operator<<(std::ostream& stream, const Proof& proof);
std::ostream& operator<<(std::ostream& stream, const Plan& plan);

}  // namespace kimisys::reshard
