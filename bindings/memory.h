// Python buffers as memory of the core, held for as long as this object lives.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <string>

#include "reshard/execute.h"

namespace kimisys::bindings {

// A held PEP 3118 buffer.
class HeldBuffer {
 public:
  // Raises BufferMismatchError, naming `what`, unless the object is a C-contiguous buffer.
  HeldBuffer(pybind11::handle object, const std::string& what);
  ~HeldBuffer();
  HeldBuffer(const HeldBuffer&) = delete;
  HeldBuffer& operator=(const HeldBuffer&) = delete;

  reshard::Memory memory() const;

 private:
  Py_buffer view_ = {};
};

// The entries of a Mapping[(rank, name) -> buffer] that `layout` knows. Absent entries are left for
// the core to report. Create and destroy with the GIL held; read without.
class HeldBuffers {
 public:
  HeldBuffers(const reshard::Layout& layout, pybind11::handle mapping, const char* side);

  const reshard::MemoryMap& map() const { return map_; }

 private:
  std::list<HeldBuffer> held_;
  reshard::MemoryMap map_;
};

}  // namespace kimisys::bindings
