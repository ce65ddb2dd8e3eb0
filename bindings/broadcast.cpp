#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "base/error.h"
#include "bindings.h"
#include "broadcast/digest.h"
#include "memory.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using Digests = py::array_t<std::uint64_t, py::array::c_style>;

Digests as_array(const std::vector<std::uint64_t>& digests) {
  return Digests(static_cast<py::ssize_t>(digests.size()), digests.data());
}

Digests digest_from_python(const reshard::Layout& layout, const py::object& buffers,
                           std::int64_t threads, const std::optional<std::string>& implementation) {
  KIMISYS_CHECK(threads >= 0, ErrorCode::kLayout, "threads is ", threads,
                "; give a positive number, or 0 for all that the process may use");
  const HeldBuffers held(layout, buffers, "digest");
  std::vector<std::uint64_t> digests;
  {
    const py::gil_scoped_release release;
    digests = broadcast::digest(layout, held.memories(), static_cast<std::size_t>(threads),
                                implementation.value_or(""));
  }
  return as_array(digests);
}

void bind_digest(py::module_& module) {
  module.def(
      "digest", &digest_from_python, py::arg("layout"), py::arg("buffers"), py::arg("threads") = 0,
      py::arg("implementation") = std::nullopt,
      "One uint64 per entry of layout.tensors: the sum mod 2^64 over the layout's elements\n"
      "of mix(tensor name, flat index in the whole tensor, bits). It does not depend on how\n"
      "the tensor is laid out and adds up over ranks; pass layout.cover() (or a rank of it)\n"
      "so that replicas count once. buffers maps (rank, buffer name) to C-contiguous\n"
      "buffers of the layout's size (BufferMismatchError). Releases the GIL. threads 0\n"
      "means all that the process may use; implementation is one of implementations().");
  module.def(
      "implementations",
      [] {
        py::list names;
        for (const std::string_view name : broadcast::digest_implementations()) {
          names.append(std::string(name));
        }
        return names;
      },
      "Names of the digest's implementations on this machine, the default first. The\n"
      "environment variable KIMISYS_BROADCAST_IMPLEMENTATION or the argument forces one.");
}

}  // namespace

void bind_broadcast(py::module_& module) {
  py::module_ broadcast = module.def_submodule("broadcast", "Digests and shared snapshots.");
  bind_encode(broadcast);
  bind_digest(broadcast);
  bind_snapshot(broadcast);
  bind_publish(broadcast);
  bind_delta(broadcast);
  bind_scatter(broadcast);
}

}  // namespace kimisys::bindings
