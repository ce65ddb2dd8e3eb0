// Streamed copies of dense rows that lie apart in the source: one shard of the columns of a matrix.
#pragma once

#include "reshard/kernels.h"
#include "reshard/rows.h"

namespace kimisys::reshard {

// The block is dense along its last axis on both sides. Copies several rows at a time, in pieces
// that take turns: a processor fetches ahead of a sweep, page by page; behind the end of each row
// it fetches what nobody asked for, or nothing. False, and nothing is copied, where rows have no
// gaps between them or turns do not help. finish_streaming() ends it.
bool copy_over_gaps(const Block& block, const RowSet& rows);

}  // namespace kimisys::reshard
