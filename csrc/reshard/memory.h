// Checks of the memory that a caller gives for the buffers of a layout, before any of it is
// touched. It may be a device's.
#pragma once

#include <vector>

#include "reshard/execute.h"
#include "reshard/layout.h"

namespace kimisys::reshard {

enum class Side { kSource, kDestination };

// The memory of each buffer of the layout, null where it is not needed. Raises BufferMismatchError,
// naming buffer and rank, for needed memory that is missing, of a wrong size, or read-only at the
// destination.
std::vector<Memory> needed_memory(const Layout& layout, const Memories& given,
                                  const std::vector<bool>& needed, Side side);

// Raises BufferMismatchError where two destinations, or a source and a destination, share memory.
// Sources may. Both lists are in the order of their layout's buffers.
void check_no_overlap(const Layout& from, const std::vector<Memory>& sources, const Layout& to,
                      const std::vector<Memory>& destinations);

}  // namespace kimisys::reshard
