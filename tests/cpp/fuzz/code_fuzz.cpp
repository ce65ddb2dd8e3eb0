// libFuzzer's entry for the codes of a block: whatever the bytes are, they are refused with a typed
// error, or give positions that encode and decode to themselves.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "broadcast/blocks.h"
#include "broadcast/code.h"

namespace kimisys::broadcast {
namespace {

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void use(const Decoded& decoded, std::int64_t elements, std::int64_t itemsize) {
  const auto& positions = decoded.positions;
  check(std::is_sorted(positions.begin(), positions.end(), std::less_equal<>()) &&
            positions.back() < elements,
        "positions do not ascend within the block");
  std::vector<std::byte> payload;
  const Descriptor again = encode(positions, decoded.values, elements, itemsize, payload);
  if (again.kind == Kind::kWhole) return;
  std::vector<std::uint32_t> scratch;
  const Decoded second = decode(again, payload, elements, itemsize, scratch);
  const std::size_t nbytes = positions.size() * static_cast<std::size_t>(itemsize);
  check(std::ranges::equal(second.positions, positions) &&
            std::memcmp(second.values, decoded.values, nbytes) == 0,
        "what was decoded does not encode to itself");
}

}  // namespace
}  // namespace kimisys::broadcast

// The first five bytes: how many elements, of which size, and the descriptor but for its length.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kimisys::broadcast;  // NOLINT: the function must stand outside
  constexpr std::size_t kHead = 5;
  if (size < kHead) return 0;
  std::uint32_t word = 0;
  std::memcpy(&word, data, sizeof(word));
  const std::int64_t elements = word % kMaxBlockElements + 1;
  const std::int64_t itemsize = std::int64_t{1} << (word >> 30U);
  // Memory of its own: the sanitizer sees what is read beyond.
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const std::vector<std::byte> payload(bytes + kHead, bytes + size);
  Descriptor descriptor = Descriptor::of(data[4] & 0x7fU);
  descriptor.nbytes = static_cast<std::uint32_t>(payload.size());
  std::vector<std::uint32_t> scratch;
  try {
    const Decoded decoded = decode(descriptor, payload, elements, itemsize, scratch);
    use(decoded, elements, itemsize);
  } catch (const kimisys::Error& error) {
    if (error.code() != kimisys::ErrorCode::kSnapshot) throw;
  }
  return 0;
}
