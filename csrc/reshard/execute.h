// Runs a plan on memory: strided N-d copies with casts, on CPU threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "reshard/plan.h"

namespace kimisys::reshard {

// Memory that the caller owns and keeps alive. `writable` is asked of destinations only.
struct Memory {
  std::byte* data = nullptr;
  std::int64_t nbytes = 0;
  bool writable = false;
};

// The memory of each buffer of a layout that the caller has, in the order of layout.buffers().
using Memories = std::vector<std::optional<Memory>>;

struct ExecuteOptions {
  std::size_t threads = 0;     // 0 means all that the process may use
  std::string implementation;  // empty: KIMISYS_RESHARD_IMPLEMENTATION, else the first of the list
};

// Names for ExecuteOptions::implementation on this machine, the default first: avx512, avx2,
// generic as far as the processor has them, and naive.
std::vector<std::string> implementations();

// A plan on its memory, checked and cut for its threads, to be run any number of times. The memory
// must stay where it is; the plan need not.
class Execution {
 public:
  // Reads need only the source buffers that the plan's copies touch; a share needs only the
  // destination buffers that it writes. Raises BufferMismatchError for a missing, wrong-sized or
  // read-only buffer and for memory that would be both read and written, or written as two buffers;
  // LayoutError for an unknown implementation.
  Execution(const Plan& plan, const Memories& sources, const Memories& destinations,
            const ExecuteOptions& options = {});
  ~Execution();
  Execution(Execution&&) noexcept;

  // Fills the destination buffers: elements from the sources, padding with zeros. A share writes
  // its bytes alone. Not from two threads at once: both would write the same memory.
  void run() const;

 private:
  struct Prepared;
  std::unique_ptr<const Prepared> prepared_;
};

// Execution(...).run(): all that Execution checks is checked before any byte is written.
void execute(const Plan& plan, const Memories& sources, const Memories& destinations,
             const ExecuteOptions& options = {});

}  // namespace kimisys::reshard
