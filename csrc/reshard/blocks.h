// A plan's copies on real addresses: what every executor starts from.
#pragma once

#include <vector>

#include "reshard/execute.h"
#include "reshard/kernels.h"
#include "reshard/plan.h"

namespace kimisys::reshard {

struct Blocks {
  std::vector<Block> copies;  // in the order of the plan's steps
  std::vector<Blank> blanks;  // the padding that the plan fills
};

// Checks the memory, none of which is read or written here: it may be a device's. Raises what
// Execution raises of it.
Blocks bind_blocks(const Plan& plan, const Memories& sources, const Memories& destinations);

// Drops axes of extent 1, sorts the others so that the destination is written forwards, and merges
// neighbours that are contiguous on both sides. At least one axis remains.
void collapse(Block& block);

}  // namespace kimisys::reshard
