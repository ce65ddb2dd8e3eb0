// Runs a plan on memory: strided N-d copies with casts, on CPU threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "reshard/plan.h"

namespace kimisys::reshard {

// Memory that the caller owns and keeps alive. `writable` is asked of destinations only.
struct Memory {
  std::byte* data = nullptr;
  std::int64_t nbytes = 0;
  bool writable = false;
};

// By (rank, buffer name).
using MemoryMap = std::map<std::pair<std::int64_t, std::string>, Memory>;

struct ExecuteOptions {
  std::size_t threads = 0;     // 0 means all that the process may use
  std::string implementation;  // empty: KIMISYS_RESHARD_IMPLEMENTATION, else the first of the list
};

// Names for ExecuteOptions::implementation on this machine, the default first: avx512, avx2,
// generic as far as the processor has them, and naive.
std::vector<std::string> implementations();

// Fills every destination buffer of the plan: elements from the sources, padding with zeros. Reads
// need only the source buffers that the plan's copies touch; a share needs only the destination
// buffers that it writes. Before any byte is written it raises
// BufferMismatchError for a missing, wrong-sized or read-only buffer and for memory that would be
// both read and written, or written as two buffers; LayoutError for an unknown implementation.
void execute(const Plan& plan, const MemoryMap& sources, const MemoryMap& destinations,
             const ExecuteOptions& options = {});

}  // namespace kimisys::reshard
