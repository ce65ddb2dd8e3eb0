// to_bytes and from_bytes of layouts and plans (see bytes.cpp for the form).
#include <optional>
#include <utility>

#include "base/fingerprint.h"
#include "reshard/bytes.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {

std::string Layout::to_bytes() const {
  ByteWriter out;
  out.raw(kLayoutMagic);
  write_layout(*this, out);
  return out.take();
}

Layout Layout::from_bytes(std::string_view bytes) {
  ByteReader in(bytes, ErrorCode::kLayout, "layout bytes");
  in.expect(kLayoutMagic);
  Layout layout = read_layout(in);
  in.end();
  return layout;
}

std::string SymbolicLayout::to_bytes() const {
  ByteWriter out;
  out.raw(kSymbolicLayoutMagic);
  write_symbolic(*this, out);
  return out.take();
}

SymbolicLayout SymbolicLayout::from_bytes(std::string_view bytes) {
  ByteReader in(bytes, ErrorCode::kLayout, "symbolic layout bytes");
  in.expect(kSymbolicLayoutMagic);
  SymbolicLayout layout = read_symbolic(in);
  in.end();
  return layout;
}

std::string Plan::to_bytes() const {
  ByteWriter out;
  out.raw(kPlanMagic);
  write_layout(*source_, out);
  write_layout(*destination_, out);
  out.number(share_of_ ? 1 : 0);
  if (share_of_) out.number(static_cast<std::uint64_t>(*share_of_));
  write_steps(*source_, *destination_, steps_, out);
  return out.take();
}

Plan Plan::from_bytes(std::string_view bytes) {
  ByteReader in(bytes, ErrorCode::kPlan, "plan bytes");
  in.expect(kPlanMagic);
  auto source = std::make_shared<const Layout>(read_layout(in));
  auto destination = std::make_shared<const Layout>(read_layout(in));
  std::optional<std::int64_t> share_of;
  if (in.index(2) == 1) share_of = in.size();
  std::vector<Step> steps = read_steps(*source, *destination, in);
  in.end();
  return {std::move(source), std::move(destination), std::move(steps), share_of};
}

std::string SymbolicPlan::to_bytes() const {
  ByteWriter out;
  out.raw(kSymbolicPlanMagic);
  write_symbolic(*source_, out);
  write_symbolic(*destination_, out);
  // The groups follow from the two layouts; only their steps are written.
  out.number(groups_.size());
  for (const Group& group : groups_) {
    write_steps(*group.source, *destination_->blocks()[group.block].layout, group.plan->steps(),
                out);
  }
  return out.take();
}

SymbolicPlan SymbolicPlan::from_bytes(std::string_view bytes) {
  ByteReader in(bytes, ErrorCode::kPlan, "symbolic plan bytes");
  in.expect(kSymbolicPlanMagic);
  auto source = std::make_shared<const SymbolicLayout>(read_symbolic(in));
  auto destination = std::make_shared<const SymbolicLayout>(read_symbolic(in));
  std::vector<Group> groups = join(*source, *destination);
  const std::size_t count = in.count();
  KIMISYS_CHECK(count == groups.size(), ErrorCode::kPlan, "symbolic plan bytes: there are ", count,
                " groups of steps, but the two layouts make ", groups.size());
  for (Group& group : groups) {
    const std::shared_ptr<const Layout>& block = destination->blocks()[group.block].layout;
    std::vector<Step> steps = read_steps(*group.source, *block, in);
    group.plan = std::make_shared<const Plan>(group.source, block, std::move(steps));
  }
  in.end();
  return {std::move(source), std::move(destination), std::move(groups)};
}

std::string Layout::fingerprint() const { return kimisys::fingerprint(to_bytes()); }
std::string SymbolicLayout::fingerprint() const { return kimisys::fingerprint(to_bytes()); }
std::string Plan::fingerprint() const { return kimisys::fingerprint(to_bytes()); }
std::string SymbolicPlan::fingerprint() const { return kimisys::fingerprint(to_bytes()); }

}  // namespace kimisys::reshard
