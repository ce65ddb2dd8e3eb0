#include "reshard/table.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "bindings.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace reshard;  // NOLINT: a binding file names nearly all of it

// Memory that the host may not be able to read, as (address, bytes). Absent entries are left for
// the core to report.
Memories memories(const Layout& layout, const py::object& mapping) {
  Memories found(layout.buffers().size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const Buffer& buffer = layout.buffers()[i];
    const py::tuple key = py::make_tuple(buffer.rank, buffer.name);
    if (!mapping.contains(key)) continue;
    const auto [address, nbytes] = py::cast<std::pair<std::uintptr_t, std::int64_t>>(mapping[key]);
    found[i] = {reinterpret_cast<std::byte*>(address), nbytes, true};  // NOLINT: an address
  }
  return found;
}

py::array_t<std::int64_t> copy_table(const Plan& plan, const py::object& sources,
                                     const py::object& destinations) {
  const Memories from = memories(plan.source(), sources);
  const Memories to = memories(plan.destination(), destinations);
  auto numbers = std::make_unique<std::vector<std::int64_t>>();
  {
    const py::gil_scoped_release release;
    *numbers = make_table(bind_blocks(plan, from, to));
  }
  const std::int64_t* data = numbers->data();
  const auto rows = static_cast<py::ssize_t>(numbers->size() / kTableColumns);
  const py::capsule owner(numbers.release(),
                          [](void* it) { delete static_cast<std::vector<std::int64_t>*>(it); });
  const py::array::ShapeContainer shape = {rows, static_cast<py::ssize_t>(kTableColumns)};
  return py::array_t<std::int64_t>(shape, data, owner);
}

}  // namespace

void bind_table(py::module_& module) {
  module.def("copy_table", &copy_table, py::arg("plan"), py::arg("sources"),
             py::arg("destinations"),
             "The plan on a device's memory as int64 [rows, 51]: strided copies of words, each as\n"
             "wide as its alignment allows, and padding as copies from address 0. For\n"
             "kimisys.kernels, which names the columns. sources, destinations: from (rank, buffer\n"
             "name) to (address, bytes); none of that memory is read or written here.\n"
             "BufferMismatchError as Plan.bind.");
}

}  // namespace kimisys::bindings
