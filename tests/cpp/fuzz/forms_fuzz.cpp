#include "fuzz/forms_fuzz.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {
namespace {

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
  if (T::from_bytes(form).to_bytes() != form) {
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
