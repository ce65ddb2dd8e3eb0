// Copies whose source lies dense along one axis and whose destination lies dense along another.
#pragma once

#include <cstddef>

#include "reshard/kernels.h"

namespace kimisys::reshard {

// The source is dense along axis `across`, the destination along the last one. With `may_stream`
// the destination is written past the caches; finish_streaming() ends it.
void copy_transposed(const Block& block, std::size_t across, bool may_stream, const RowSet& rows);

}  // namespace kimisys::reshard
