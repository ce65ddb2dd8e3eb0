#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "bindings.h"
#include "broadcast/digest.h"
#include "broadcast/snapshot.h"
#include "memory.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using broadcast::Published;
using broadcast::Snapshot;

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

// A view of the data keeps the Snapshot, and with it the mapping, alive.
py::buffer_info view(Snapshot& self) {
  const auto nbytes = static_cast<py::ssize_t>(self.data().size());
  return {self.data().data(), 1, "B", 1, {nbytes}, {py::ssize_t{1}}, !self.writable()};
}

std::uint64_t checked_version(std::int64_t version) {
  KIMISYS_CHECK(version >= 0, ErrorCode::kVersion, "version ", version,
                " is negative; versions start at 0 and strictly increase");
  return static_cast<std::uint64_t>(version);
}

void bind_snapshot(py::module_& module) {
  py::class_<Published>(module, "Published", "One version of a snapshot as its reader found it.")
      .def_readonly("sequence", &Published::sequence)
      .def_readonly("version", &Published::version)
      .def_property_readonly("digests",
                             [](const Published& self) { return as_array(self.digests); });
  py::class_<Snapshot>(module, "Snapshot", py::buffer_protocol(),
                       "The published weights of one version at one rank, in shared memory of\n"
                       "sealed size. A buffer of its data bytes: writable where it was created,\n"
                       "read-only where it was opened. Views keep the memory alive.")
      .def_buffer(&view)
      .def_static("create", &Snapshot::create, py::arg("nbytes"), py::arg("digest_count"),
                  py::call_guard<py::gil_scoped_release>(),
                  "New shared memory with nothing published; SnapshotError when there is none.\n"
                  "Releases the GIL while all pages are allocated.")
      .def_static("open", &Snapshot::open, py::arg("descriptor"),
                  "Maps a peer's snapshot read-only; the descriptor stays the caller's. Raises\n"
                  "SnapshotError for whatever is not a sealed snapshot of a known format.")
      .def("fileno", &Snapshot::descriptor)
      .def_property_readonly("nbytes", [](const Snapshot& self) { return self.data().size(); })
      .def_property_readonly("digest_count", &Snapshot::digest_count)
      .def_property_readonly("writable", &Snapshot::writable)
      .def(
          "begin",
          [](Snapshot& self, std::int64_t version) { self.begin(checked_version(version)); },
          py::arg("version"),
          "Makes the snapshot unreadable until commit; VersionError unless version increases.")
      .def(
          "commit",
          [](Snapshot& self, const Digests& digests) {
            self.commit({digests.data(), static_cast<std::size_t>(digests.size())});
          },
          py::arg("digests"), "Publishes what was written since begin, with uint64 digests.")
      .def("abort", &Snapshot::abort,
           "Takes begin back; only right while no byte has been written since.")
      .def("published", &Snapshot::published,
           "The version that may be read now. Raises SnapshotError while it is being written or\n"
           "after its writer failed, VersionError when nothing was published.")
      .def("confirm", &Snapshot::confirm, py::arg("published"),
           "Raises SnapshotError if a write began after published(): what was read may be torn.");
}

}  // namespace

void bind_broadcast(py::module_& module) {
  py::module_ broadcast = module.def_submodule("broadcast", "Digests and shared snapshots.");
  bind_encode(broadcast);
  bind_digest(broadcast);
  bind_snapshot(broadcast);
  bind_delta(broadcast);
}

}  // namespace kimisys::bindings
