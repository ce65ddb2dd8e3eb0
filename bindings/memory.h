// Python buffers as memory of the core, held for as long as this object lives.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "reshard/execute.h"

namespace kimisys::bindings {

// The entries of a Mapping[(rank, name) -> PEP 3118 buffer] that `layout` knows. Absent entries are
// left for the core to report. Create and destroy with the GIL held; read without.
class HeldBuffers {
 public:
  // Raises BufferMismatchError, naming `side` and the buffer, for what is no C-contiguous buffer.
  HeldBuffers(const reshard::Layout& layout, pybind11::handle mapping, const char* side);
  ~HeldBuffers();
  HeldBuffers(const HeldBuffers&) = delete;
  HeldBuffers& operator=(const HeldBuffers&) = delete;

  const reshard::Memories& memories() const { return memories_; }

 private:
  void hold(pybind11::handle object, const reshard::Buffer& buffer, const char* side);

  std::vector<Py_buffer> views_;
  reshard::Memories memories_;
};

}  // namespace kimisys::bindings
