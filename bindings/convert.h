// How the types of the core become Python's.
#pragma once

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/layout.h"

// Dims from any sequence of integers.
template <>
struct pybind11::detail::type_caster<kimisys::reshard::Dims> {
  using Dims = kimisys::reshard::Dims;
  using List = make_caster<std::vector<std::int64_t>>;
  PYBIND11_TYPE_CASTER(Dims, List::name);

  bool load(handle source, bool convert) {
    List list;
    if (!list.load(source, convert)) return false;
    const auto& items = static_cast<std::vector<std::int64_t>&>(list);
    value = Dims(items.begin(), items.end());
    return true;
  }

  static handle cast(const Dims& dims, return_value_policy, handle) {
    pybind11::tuple items(dims.size());
    for (std::size_t d = 0; d < dims.size(); ++d) items[d] = dims[d];
    return items.release();
  }
};

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

inline py::tuple as_tuple(const Dims& dims) {
  py::tuple tuple(dims.size());
  for (std::size_t d = 0; d < dims.size(); ++d) tuple[d] = dims[d];
  return tuple;
}

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

// to_bytes, from_bytes and fingerprint. `refused` says what from_bytes raises.
template <typename T, typename... Options>
void bind_form(py::class_<T, Options...>& type, const std::string& refused) {
  type.def(
          "to_bytes", [](const T& self) { return py::bytes(self.to_bytes()); },
          "The compact form: equal values give equal bytes.")
      .def_static(
          "from_bytes",
          [](const py::bytes& data) {
            const auto view = static_cast<std::string_view>(data);
            const py::gil_scoped_release release;
            return T::from_bytes(view);
          },
          py::arg("data"), ("Reads to_bytes' form; " + refused).c_str())
      .def_property_readonly("fingerprint", &T::fingerprint,
                             "32 hexadecimal digits, 128 bits over to_bytes().");
}

}  // namespace kimisys::bindings
