#include "broadcast/publish.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/error.h"
#include "bindings.h"
#include "memory.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using broadcast::Publish;
using broadcast::PublisherCore;
using broadcast::Snapshot;

// The core, and the live layout that tells its buffers.
class Publishing {
 public:
  Publishing(const reshard::Layout& live, const reshard::Layout& snapshot,
             const reshard::Layout& counted, std::shared_ptr<Snapshot> memory)
      : live_(live), core_(live, snapshot, counted, std::move(memory)) {}

  Publish publish(std::int64_t version, const py::object& buffers, bool full, std::int64_t threads,
                  const std::optional<std::string>& implementation) {
    KIMISYS_CHECK(version >= 0, ErrorCode::kVersion, "version ", version,
                  " is negative; versions start at 0 and strictly increase");
    KIMISYS_CHECK(threads >= 0, ErrorCode::kLayout, "threads is ", threads,
                  "; give a positive number, or 0 for all that the process may use");
    const HeldBuffers held(live_, buffers, "live");
    const py::gil_scoped_release release;
    const std::unique_lock lock(busy_, std::try_to_lock);
    KIMISYS_CHECK(lock.owns_lock(), ErrorCode::kSnapshot,
                  "another thread publishes with this object; publish one version after the other");
    return core_.publish(static_cast<std::uint64_t>(version), held.memories(), full,
                         static_cast<std::size_t>(threads), implementation.value_or(""));
  }

 private:
  reshard::Layout live_;
  PublisherCore core_;
  std::mutex busy_;
};

}  // namespace

void bind_publish(py::module_& broadcast) {
  py::class_<Publish>(broadcast, "Publish", "What one publish did.")
      .def_readonly("version", &Publish::version)
      .def_readonly("base", &Publish::base,
                    "The version that the record changes; None where all was published.")
      .def_readonly("elements", &Publish::elements)
      .def_readonly("nbytes", &Publish::nbytes, "Of the elements, in the snapshot's dtypes.")
      .def_readonly("changed", &Publish::changed, "Elements; all of them where base is None.")
      .def_readonly("record_nbytes", &Publish::record_nbytes, "Of the log; 0 where base is None.")
      .def_readonly("whole_nbytes", &Publish::whole_nbytes,
                    "Of blocks that the record holds whole.")
      .def_readonly("referred_nbytes", &Publish::referred_nbytes,
                    "Of blocks that the record leaves in the snapshot's data.");
  py::class_<Publishing>(
      broadcast, "PublisherCore",
      "Makes one rank's live weights the next version of its snapshot, and what\n"
      "changed a record of its log.")
      .def(
          py::init<const reshard::Layout&, const reshard::Layout&, const reshard::Layout&,
                   std::shared_ptr<Snapshot>>(),
          py::arg("live"), py::arg("snapshot"), py::arg("counted"), py::arg("memory"),
          "live and snapshot: this rank's layouts; counted: the part of the cover of the snapshot\n"
          "layout of all ranks that this rank counts in the digests. LayoutError unless each\n"
          "snapshot fragment has a live one of its region; SnapshotError unless memory was "
          "created\n"
          "here with the sizes of snapshot.")
      .def("publish", &Publishing::publish, py::arg("version"), py::arg("buffers"),
           py::arg("full") = false, py::arg("threads") = 0,
           py::arg("implementation") = std::nullopt,
           "Publishes what changed since the last version; all of it when full, at first, after a\n"
           "publish that failed half-way, and where the log is too small for a record. buffers "
           "maps\n"
           "(rank, buffer name) to C-contiguous live buffers (BufferMismatchError). VersionError\n"
           "unless version increases. These come before anything changes. Releases the GIL.");
}

}  // namespace kimisys::bindings
