#include "memory.h"

#include <optional>
#include <string>

#include "base/error.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

// mapping[key], or null if it has no such key.
py::object find(py::handle mapping, py::handle key) {
  if (PyDict_CheckExact(mapping.ptr()) != 0) {
    PyObject* found = PyDict_GetItemWithError(mapping.ptr(), key.ptr());
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(found);
  }
  if (!mapping.contains(key)) return {};
  return mapping[key];
}

}  // namespace

HeldBuffers::HeldBuffers(const reshard::Layout& layout, py::handle mapping, const char* side) {
  const std::vector<reshard::Buffer>& buffers = layout.buffers();
  views_.reserve(buffers.size());  // a held Py_buffer must not move
  memories_.resize(buffers.size());
  try {
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      const py::object found = find(mapping, py::make_tuple(buffers[i].rank, buffers[i].name));
      if (!found) continue;
      hold(found, buffers[i], side);
      const Py_buffer& view = views_.back();
      memories_[i] = {static_cast<std::byte*>(view.buf), view.len, view.readonly == 0};
    }
  } catch (...) {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
    throw;
  }
}

HeldBuffers::~HeldBuffers() {
  for (Py_buffer& view : views_) PyBuffer_Release(&view);
}

void HeldBuffers::hold(py::handle object, const reshard::Buffer& buffer, const char* side) {
  views_.emplace_back();
  if (PyObject_GetBuffer(object.ptr(), &views_.back(), PyBUF_C_CONTIGUOUS) == 0) return;
  views_.pop_back();
  PyErr_Clear();
  fail(ErrorCode::kBufferMismatch, side, " buffer '", buffer.name, "' of rank ", buffer.rank,
       " is a ", std::string(py::str(py::type::handle_of(object).attr("__name__"))),
       " that does not give a C-contiguous buffer; pass a contiguous numpy array (of a torch "
       "tensor: tensor.view(torch.uint8).numpy())");
}

}  // namespace kimisys::bindings
