#include "fuzz/forms_fuzz.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {
namespace {

// What a caller asks of a value next. A value that was read is a valid one: nothing is refused.
void use(const Layout& layout) { layout.cover(); }

void use(const SymbolicLayout& layout) {
  if (!layout.ranks().empty()) layout.of_rank(layout.ranks().back());
}

void use(const Plan& plan) {
  plan.fills_padding();
  for (std::size_t i = 0; i < plan.steps().size(); ++i) plan.copy(i);
  if (!plan.destination().ranks().empty()) plan.of_rank(plan.destination().ranks().back());
  if (!plan.source().ranks().empty()) {
    plan.of_source(plan.share_of().value_or(plan.source().ranks().front()));
  }
}

void use(const SymbolicPlan& plan) {
  plan.traffic();
  if (!plan.destination().ranks().empty()) plan.of_rank(plan.destination().ranks().back());
  for (const std::int64_t rank : plan.source().ranks()) plan.of_source(rank);
}

template <typename T>
void read(std::string_view bytes) {
  std::string form;
  try {
    form = T::from_bytes(bytes).to_bytes();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kLayout || error.code() == ErrorCode::kPlan) return;
    throw;
  }
  // Out of the catch: what was written must be accepted.
  const T again = T::from_bytes(form);
  use(again);
  if (again.to_bytes() != form) {
    std::fputs("a value that was read writes bytes that read back differently\n", stderr);
    std::abort();
  }
}

}  // namespace
}  // namespace kimisys::reshard

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kimisys::reshard;  // NOLINT: the function must stand outside
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  read<Layout>(bytes);
  read<SymbolicLayout>(bytes);
  read<Plan>(bytes);
  read<SymbolicPlan>(bytes);
  return 0;
}
