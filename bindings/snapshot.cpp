// The shared memory of a publisher, its records, and the writer's steps.
#include "broadcast/snapshot.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "broadcast/log.h"
#include "broadcast/record.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using broadcast::Draft;
using broadcast::Increment;
using broadcast::kNone;
using broadcast::Parts;
using broadcast::Published;
using broadcast::Record;
using broadcast::Snapshot;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> as_array(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename T>
std::vector<T> as_vector(const Array<T>& values) {
  return {values.data(), values.data() + values.size()};
}

template <typename T>
std::span<const T> as_span(const Array<T>& values) {
  return {values.data(), static_cast<std::size_t>(values.size())};
}

// The bytes of any C-contiguous buffer, held while the object lives.
class HeldBytes {
 public:
  explicit HeldBytes(const py::buffer& buffer, bool writable = false)
      : info_(buffer.request(writable)) {
    py::ssize_t stride = info_.itemsize;
    for (py::ssize_t d = info_.ndim; d-- > 0;) {
      const auto axis = static_cast<std::size_t>(d);
      if (info_.shape[axis] != 1 && info_.strides[axis] != stride) {
        fail(ErrorCode::kBufferMismatch,
             "a buffer is not C-contiguous; pass bytes or a contiguous array");
      }
      stride *= info_.shape[axis];
    }
  }

  std::span<std::byte> bytes() const {
    return {static_cast<std::byte*>(info_.ptr),
            static_cast<std::size_t>(info_.size * info_.itemsize)};
  }

 private:
  py::buffer_info info_;
};

// A view of the data keeps the Snapshot, and with it the mapping, alive.
py::buffer_info view(Snapshot& self) {
  const auto nbytes = static_cast<py::ssize_t>(self.data().size());
  return {self.data().data(), 1, "B", 1, {nbytes}, {py::ssize_t{1}}, !self.writable()};
}

// All of the memory, read-only; the array keeps the Snapshot alive.
Array<std::uint8_t> mapped(const py::object& self) {
  const std::span<const std::byte> memory = self.cast<const Snapshot&>().memory();
  Array<std::uint8_t> array(static_cast<py::ssize_t>(memory.size()),
                            reinterpret_cast<const std::uint8_t*>(memory.data()), self);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

void read(const Snapshot& self, const Array<std::int64_t>& ranges, const py::buffer& into) {
  KIMISYS_CHECK(ranges.ndim() == 2 && ranges.shape(1) == 3, ErrorCode::kSnapshot,
                "ranges are int64[n, 3]: offset in the memory, offset in `into`, bytes");
  const HeldBytes held(into, true);
  std::vector<Snapshot::Range> list;
  for (py::ssize_t i = 0; i < ranges.shape(0); ++i) {
    list.push_back({ranges.at(i, 0), ranges.at(i, 1), ranges.at(i, 2)});
  }
  const py::gil_scoped_release release;
  self.read(list, held.bytes());
}

std::uint64_t checked_version(std::int64_t version) {
  KIMISYS_CHECK(version >= 0, ErrorCode::kVersion, "version ", version,
                " is negative; versions start at 0 and strictly increase");
  return static_cast<std::uint64_t>(version);
}

std::optional<std::uint64_t> unless_none(std::uint64_t value) {
  return value == kNone ? std::nullopt : std::optional(value);
}

void bind_parts(py::module_& module) {
  py::class_<Parts>(
      module, "Parts",
      "Where the parts of a snapshot's shared memory lie: offsets and sizes in bytes.")
      .def_static(
          "parse",
          [](const py::buffer& header, std::size_t nbytes) {
            return Parts::parse(HeldBytes(header).bytes(), nbytes);
          },
          py::arg("header"), py::arg("nbytes"),
          "Of a memory of nbytes bytes that begins with header, its first HEADER_NBYTES; hostile:\n"
          "SnapshotError unless it is a snapshot of the format that this build reads.")
      .def_readonly("nbytes", &Parts::nbytes)
      .def_readonly("digest_offset", &Parts::digest_offset)
      .def_readonly("digest_count", &Parts::digest_count)
      .def_readonly("log_offset", &Parts::log_offset)
      .def_readonly("log_nbytes", &Parts::log_nbytes)
      .def_readonly("data_offset", &Parts::data_offset)
      .def_readonly("data_nbytes", &Parts::data_nbytes);
  module.attr("HEADER_NBYTES") = broadcast::kHeaderNbytes;
  module.attr("WORDS_OFFSET") = broadcast::kWordsOffset;
}

void bind_published(py::module_& module) {
  py::class_<Published>(module, "Published", "One version of a snapshot as its reader found it.")
      .def_readonly("sequence", &Published::sequence)
      .def_readonly("version", &Published::version)
      .def_property_readonly("digests",
                             [](const Published& self) { return as_array(self.digests); });
}

using SnapshotClass = py::class_<Snapshot, std::shared_ptr<Snapshot>>;

void bind_reading(SnapshotClass& type) {
  type.def_buffer(&view)
      .def_static("open", &Snapshot::open, py::arg("descriptor"),
                  "Maps a peer's snapshot read-only; the descriptor stays the caller's. Raises\n"
                  "SnapshotError for whatever is not a sealed snapshot of a known format.")
      .def("fileno", &Snapshot::descriptor)
      .def_property_readonly("parts", &Snapshot::parts)
      .def_property_readonly("nbytes", [](const Snapshot& self) { return self.data().size(); })
      .def_property_readonly("digest_count", &Snapshot::digest_count)
      .def_property_readonly("writable", &Snapshot::writable)
      .def("mapped", &mapped,
           "All parts.nbytes bytes of the memory, uint8, read-only. Keeps the memory alive.")
      .def("read", &read, py::arg("ranges"), py::arg("into"),
           "Copies ranges int64[n, 3] (offset in the memory, offset in into, bytes) into a\n"
           "writable buffer, as atomic 8-byte words, in their order. Releases the GIL.\n"
           "SnapshotError, before anything is copied, for a range outside of either side.")
      .def("published", &Snapshot::published,
           "The version that may be read now. Raises SnapshotError while it is being written or\n"
           "after its writer failed, VersionError when nothing was published.")
      .def("confirm", &Snapshot::confirm, py::arg("published"),
           "Raises SnapshotError if a write began after published(): what was read may be torn.");
}

void bind_writing(SnapshotClass& type) {
  type.def_static(
          "create", &Snapshot::create, py::arg("nbytes"), py::arg("digest_count"),
          py::arg("log_nbytes") = 0, py::call_guard<py::gil_scoped_release>(),
          "New shared memory with nothing published, nbytes of data and a log of log_nbytes\n"
          "(rounded up to eight); SnapshotError when there is none. Releases the GIL while\n"
          "all pages are allocated.")
      .def(
          "begin",
          [](Snapshot& self, std::int64_t version) { self.begin(checked_version(version)); },
          py::arg("version"),
          "Makes the snapshot unreadable until commit; VersionError unless version increases.")
      .def(
          "commit",
          [](Snapshot& self, const Array<std::uint64_t>& digests) {
            self.commit(as_span(digests));
          },
          py::arg("digests"), "Publishes what was written since begin, with uint64 digests.")
      .def("abort", &Snapshot::abort,
           "Takes begin back; only right while no byte has been written since.")
      .def(
          "publish_record",
          [](Snapshot& self, std::uint64_t position) { self.log().publish(position); },
          py::arg("position"), "Readers of the log find the complete record there from now on.")
      .def(
          "restart_log", [](Snapshot& self) { self.log().restart(); },
          "No record leads to the version that is published next.");
}

void bind_record(py::module_& module) {
  py::class_<Record>(module, "Record", "What one version changed, as the log says it.")
      .def_static(
          "parse_header",
          [](const py::buffer& header, std::uint64_t log_nbytes) {
            return Record::parse_header(HeldBytes(header).bytes(), log_nbytes);
          },
          py::arg("header"), py::arg("log_nbytes"),
          "Bytes of header and tables together, from the first RECORD_HEADER_NBYTES of a record "
          "in\n"
          "a log of log_nbytes; hostile: SnapshotError for whatever cannot be.")
      .def_static(
          "parse", [](const py::buffer& bytes) { return Record::parse(HeldBytes(bytes).bytes()); },
          py::arg("header_and_tables"),
          "Reads header and tables, hostile: SnapshotError for whatever is malformed.")
      .def_readonly("version", &Record::version)
      .def_readonly("base", &Record::base)
      .def_property_readonly("previous",
                             [](const Record& self) { return unless_none(self.previous); })
      .def_readonly("changed", &Record::changed)
      .def_readonly("table_nbytes", &Record::table_nbytes)
      .def_readonly("payload_nbytes", &Record::payload_nbytes)
      .def_property_readonly("payload_offset", &Record::payload_offset)
      .def_property_readonly("nbytes", &Record::nbytes)
      .def_property_readonly("chunk_offsets",
                             [](const Record& self) { return as_array(self.chunk_offsets); })
      .def_property_readonly("descriptors",
                             [](const Record& self) { return as_array(self.descriptors); })
      .def_property_readonly(
          "tensors",
          [](const Record& self) {
            std::vector<std::uint32_t> tensors;
            for (const Increment& each : self.increments) {
              tensors.push_back(static_cast<std::uint32_t>(each.first));
            }
            return as_array(tensors);
          },
          "Of the layout's table, those whose digest changes; uint32, ascending.")
      .def_property_readonly(
          "increments",
          [](const Record& self) {
            std::vector<std::uint64_t> sums;
            for (const Increment& each : self.increments) sums.push_back(each.second);
            return as_array(sums);
          },
          "What is added to the digest of each of tensors; uint64.");
  module.attr("RECORD_HEADER_NBYTES") = broadcast::kRecordHeaderNbytes;
}

std::uint64_t finish(Draft& self, const Array<std::uint64_t>& chunk_offsets,
                     const Array<std::uint32_t>& tensors, const Array<std::uint64_t>& increments,
                     const Array<std::uint32_t>& descriptors, std::uint64_t changed) {
  KIMISYS_CHECK(tensors.size() == increments.size(), ErrorCode::kSnapshot, "got ", tensors.size(),
                " tensors and ", increments.size(), " increments; pass one for each");
  std::vector<Increment> pairs;
  for (py::ssize_t i = 0; i < tensors.size(); ++i) {
    pairs.emplace_back(tensors.at(i), increments.at(i));
  }
  return self.finish(as_vector(chunk_offsets), std::move(pairs), as_vector(descriptors), changed);
}

void bind_draft(py::module_& module) {
  py::class_<Draft>(module, "Draft",
                    "A record while it is written, step by step. PublisherCore does all steps.")
      .def_static(
          "begin",
          [](Snapshot& snapshot, std::int64_t version, std::int64_t base, std::size_t chunks,
             std::size_t steps, std::size_t blocks) {
            return Draft::begin(snapshot.log(), checked_version(version), checked_version(base),
                                chunks, steps, blocks);
          },
          py::arg("snapshot"), py::arg("version"), py::arg("base"), py::arg("chunks"),
          py::arg("steps"), py::arg("blocks"), py::keep_alive<0, 1>(),
          "Takes room for header and tables; None when the log is too small for them.")
      .def_property_readonly("position", &Draft::position)
      .def("reserve", &Draft::reserve, py::arg("nbytes"),
           "Takes room for a chunk's payload: its offset in the record's; None when the log is "
           "full.")
      .def(
          "append",
          [](Draft& self, std::uint64_t offset, const py::buffer& payload) {
            self.append(offset, HeldBytes(payload).bytes());
          },
          py::arg("offset"), py::arg("payload"), "Writes into what was reserved.")
      .def("finish", &finish, py::arg("chunk_offsets"), py::arg("tensors"), py::arg("increments"),
           py::arg("descriptors"), py::arg("changed"),
           "Writes header and tables: the record is complete. Returns its bytes.");
}

}  // namespace

void bind_snapshot(py::module_& broadcast) {
  bind_parts(broadcast);
  bind_published(broadcast);
  SnapshotClass type(
      broadcast, "Snapshot", py::buffer_protocol(),
      "The published weights of one rank in shared memory of sealed size, and the\n"
      "log of its recent versions. A buffer of its data bytes: writable where it was\n"
      "created, read-only where it was opened. Views keep the memory alive.");
  bind_reading(type);
  bind_writing(type);
  bind_record(broadcast);
  bind_draft(broadcast);
}

}  // namespace kimisys::bindings
