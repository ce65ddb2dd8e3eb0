#include "memory.h"

#include "base/error.h"

namespace py = pybind11;

namespace kimisys::bindings {

HeldBuffer::HeldBuffer(py::handle object, const std::string& what) {
  if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS) != 0) {
    PyErr_Clear();
    fail(ErrorCode::kBufferMismatch, what, " is a ",
         std::string(py::str(py::type::handle_of(object).attr("__name__"))),
         " that does not give a C-contiguous buffer; pass a contiguous numpy array (of a torch "
         "tensor: tensor.view(torch.uint8).numpy())");
  }
}

HeldBuffer::~HeldBuffer() { PyBuffer_Release(&view_); }

reshard::Memory HeldBuffer::memory() const {
  return {static_cast<std::byte*>(view_.buf), view_.len, view_.readonly == 0};
}

HeldBuffers::HeldBuffers(const reshard::Layout& layout, py::handle mapping, const char* side) {
  for (const reshard::Buffer& buffer : layout.buffers()) {
    const py::tuple key = py::make_tuple(buffer.rank, buffer.name);
    if (!mapping.contains(key)) continue;
    const std::string what =
        std::string(side) + " buffer '" + buffer.name + "' of rank " + std::to_string(buffer.rank);
    held_.emplace_back(mapping[key], what);
    map_.emplace(std::pair(buffer.rank, buffer.name), held_.back().memory());
  }
}

}  // namespace kimisys::bindings
