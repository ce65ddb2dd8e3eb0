// How the types of the core become Python's.
#pragma once

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "reshard/layout.h"

namespace kimisys::bindings {

namespace py = pybind11;
using reshard::Dims;

// Python's handle on a layout. pybind11 knows no shared_ptr to const; nothing that is bound changes
// a layout.
using SharedLayout = std::shared_ptr<reshard::Layout>;

template <typename T>
std::shared_ptr<T> shared(const std::shared_ptr<const T>& value) {
  return std::const_pointer_cast<T>(value);
}

template <typename T>
std::string repr(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

inline py::tuple as_tuple(const Dims& dims) { return py::tuple(py::cast(dims)); }

// A table of the layout as a tuple of values.
template <typename T>
py::tuple as_tuple(const std::vector<T>& items) {
  py::tuple tuple(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) tuple[i] = py::cast(items[i]);
  return tuple;
}

// Read-only properties for a member that is a Dims or a DType.
template <typename T>
auto dims_of(Dims T::* member) {
  return [member](const T& self) { return as_tuple(self.*member); };
}

template <typename T>
auto dtype_of(DType T::* member) {
  return [member](const T& self) { return std::string(dtype_name(self.*member)); };
}

// __repr__, __eq__ and a __hash__ that agrees with it, from the printed form.
template <typename T>
void bind_value(py::class_<T>& type) {
  type.def("__repr__", &repr<T>).def(py::self == py::self).def("__hash__", [](const T& self) {
    return py::hash(py::str(repr(self)));
  });
}

}  // namespace kimisys::bindings
