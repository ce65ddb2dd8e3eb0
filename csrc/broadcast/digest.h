// Layout-independent digests: per tensor, a 64-bit sum over elements of a keyed mix (see mix.h).
//
// The digest of a tensor depends on its name, its values and nothing else: not on how it is split,
// fused, strided or replicated (as long as each element is counted once: pass Layout::cover()).
// It is additive mod 2^64 over any partition of the elements, so ranks add up their parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "reshard/execute.h"
#include "reshard/layout.h"

namespace kimisys::broadcast {

// One digest per entry of layout.tensors(); 0 for a tensor without elements in the layout.
//
// `memory` holds at least the buffers that the layout's fragments use. `threads`: 0 means all that
// the process may use. `implementation`: empty, or one of digest_implementations(); empty takes
// KIMISYS_BROADCAST_IMPLEMENTATION, else the fastest. Raises BufferMismatchError for a missing or
// wrong-sized buffer, LayoutError for an unknown implementation.
std::vector<std::uint64_t> digest(const reshard::Layout& layout, const reshard::Memories& memory,
                                  std::size_t threads = 0, std::string_view implementation = {});

// Names for `implementation`, fastest first; "naive" goes element by element.
std::vector<std::string_view> digest_implementations();

}  // namespace kimisys::broadcast
