#include "broadcast/scatter.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "memory.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using broadcast::Range;
using broadcast::Record;
using broadcast::Scatter;
using broadcast::Staged;
using broadcast::Sums;
using broadcast::Window;

using BlockArray = py::array_t<std::uint32_t, py::array::c_style>;

// A Python object's bytes, read-only, held as long as this lives. Create and destroy with the GIL.
class HeldBytes {
 public:
  HeldBytes(const py::object& object, const char* what) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS) == 0) return;
    PyErr_Clear();
    fail(ErrorCode::kBufferMismatch, "the ", what,
         " does not give a C-contiguous buffer; pass bytes, a memoryview or a numpy array");
  }
  ~HeldBytes() { PyBuffer_Release(&view_); }
  HeldBytes(const HeldBytes&) = delete;
  HeldBytes& operator=(const HeldBytes&) = delete;

  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
  }

 private:
  Py_buffer view_{};
};

// A staged record with the payload that it points into.
struct BoundStaged {
  std::unique_ptr<HeldBytes> payload;
  Staged staged;
};

std::vector<const Staged*> pointers(const std::vector<const BoundStaged*>& list) {
  std::vector<const Staged*> staged;
  for (const BoundStaged* each : list) {
    KIMISYS_CHECK(each != nullptr, ErrorCode::kLayout, "a staged record is None");
    staged.push_back(&each->staged);
  }
  return staged;
}

std::size_t checked_threads(std::int64_t threads) {
  KIMISYS_CHECK(threads >= 0, ErrorCode::kLayout, "threads is ", threads,
                "; give a positive number, or 0 for all that the process may use");
  return static_cast<std::size_t>(threads);
}

std::span<const std::uint32_t> as_span(const BlockArray& blocks) {
  return {blocks.data(), static_cast<std::size_t>(blocks.size())};
}

BlockArray as_array(const std::vector<std::uint32_t>& blocks) {
  return BlockArray(static_cast<py::ssize_t>(blocks.size()), blocks.data());
}

py::array_t<std::int64_t> as_array(const std::vector<Range>& ranges) {
  py::array_t<std::int64_t> array({static_cast<py::ssize_t>(ranges.size()), py::ssize_t{2}});
  auto rows = array.mutable_unchecked<2>();
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const auto row = static_cast<py::ssize_t>(i);
    rows(row, 0) = ranges[i].offset;
    rows(row, 1) = ranges[i].nbytes;
  }
  return array;
}

py::array_t<std::uint64_t> as_array(const Scatter& self, const Sums& sums) {
  const auto rounds = static_cast<py::ssize_t>(self.rounds());
  const auto tensors = static_cast<py::ssize_t>(self.source().tensors().size());
  return py::array_t<std::uint64_t>({rounds, tensors}, sums.data());
}

std::unique_ptr<BoundStaged> stage(const Scatter& self, std::int64_t rank, const Record& record,
                                   const py::object& payload) {
  auto made = std::make_unique<BoundStaged>();
  made->payload = std::make_unique<HeldBytes>(payload, "payload");
  made->staged = self.stage(rank, record, made->payload->bytes());
  return made;
}

py::array_t<std::uint64_t> measure(const Scatter& self,
                                   const std::vector<const BoundStaged*>& staged,
                                   const py::object& destinations, std::int64_t threads) {
  const std::size_t count = checked_threads(threads);
  const std::vector<const Staged*> list = pointers(staged);
  const HeldBuffers held(self.destination(), destinations, "destination");
  Sums sums;
  {
    const py::gil_scoped_release release;
    sums = self.measure(list, held.memories(), count);
  }
  return as_array(self, sums);
}

std::int64_t apply(const Scatter& self, const std::vector<const BoundStaged*>& staged,
                   const py::object& destinations, std::int64_t threads) {
  const std::size_t count = checked_threads(threads);
  const std::vector<const Staged*> list = pointers(staged);
  const HeldBuffers held(self.destination(), destinations, "destination");
  const py::gil_scoped_release release;
  return self.apply(list, held.memories(), count);
}

py::array_t<std::uint64_t> land(const Scatter& self, std::int64_t rank, const BlockArray& blocks,
                                const py::object& image, std::int64_t begin,
                                const py::object& destinations, bool subtract,
                                std::int64_t threads) {
  const std::size_t count = checked_threads(threads);
  const HeldBytes from(image, "image");
  const HeldBuffers held(self.destination(), destinations, "destination");
  Sums sums;
  {
    const py::gil_scoped_release release;
    sums = self.land(rank, as_span(blocks), from.bytes(), begin, held.memories(), subtract, count);
  }
  return as_array(self, sums);
}

std::vector<Window> windows(const Scatter& self, std::int64_t rank,
                            const std::optional<BlockArray>& blocks, std::int64_t limit) {
  if (blocks) return self.windows(rank, as_span(*blocks), limit);
  return self.windows(rank, self.blocks(rank), limit);
}

py::set touched(const Scatter& self, const std::vector<const BoundStaged*>& staged) {
  py::set names;
  for (const std::size_t i : self.touched(pointers(staged))) {
    const reshard::Buffer& buffer = self.destination().buffers()[i];
    names.add(py::make_tuple(buffer.rank, buffer.name));
  }
  return names;
}

void bind_parts(py::module_& module) {
  py::class_<BoundStaged>(module, "Staged",
                          "The part of one rank's record that an engine rank needs. It holds the\n"
                          "payload, whose bytes must stay as they are as long as this is used.")
      .def_property_readonly("rank", [](const BoundStaged& self) { return self.staged.rank(); })
      .def_property_readonly(
          "references", [](const BoundStaged& self) { return as_array(self.staged.references()); },
          "uint32[n]: needed blocks that the record does not hold: land them.");
  py::class_<Window>(module, "Window", "Needed blocks whose bytes lie together in the data.")
      .def_readonly("begin", &Window::begin, "Byte of the rank's snapshot data.")
      .def_readonly("end", &Window::end)
      .def_property_readonly(
          "blocks", [](const Window& self) { return as_array(self.blocks); },
          "uint32[n], for land.")
      .def_property_readonly(
          "ranges", [](const Window& self) { return as_array(self.ranges); },
          "int64[n, 2]: (offset, nbytes) in the snapshot's data: the bytes that land reads,\n"
          "ascending, merged where adjacent.");
}

void bind_reading(py::class_<Scatter>& type) {
  type.def_property_readonly("ranks", &Scatter::ranks, "Trainer ranks that are read, ascending.")
      .def(
          "blocks",
          [](const Scatter& self, std::int64_t rank) { return as_array(self.blocks(rank)); },
          py::arg("rank"),
          "uint32[n]: the blocks of a trainer rank that are needed, ascending. LayoutError, here\n"
          "and below, for a rank that is not read.")
      .def(
          "payload",
          [](const Scatter& self, std::int64_t rank, const Record& record) {
            return as_array(self.payload(rank, record));
          },
          py::arg("rank"), py::arg("record"),
          "int64[n, 2]: (offset, nbytes) in the record's payload of the bytes that are needed,\n"
          "ascending, merged where nearly adjacent. SnapshotError for tables that do not fit the\n"
          "rank's blocks.")
      .def("stage", &stage, py::arg("rank"), py::arg("record"), py::arg("payload"),
           "A record ready to be measured. payload: the bytes of payload(), one range after the\n"
           "other; it is held, not copied. SnapshotError for tables that do not fit the rank's\n"
           "blocks, and for another number of bytes.")
      .def("windows", &windows, py::arg("rank"), py::arg("blocks"), py::arg("limit"),
           "The bytes of a rank's snapshot data that hold these blocks (None: all that are\n"
           "needed), in windows of at most `limit` bytes, or of one block, in order of memory.\n"
           "LayoutError for a block that is not needed.")
      .def("touched", &touched, py::arg("staged"),
           "(rank, buffer name) of each destination buffer that apply, or landing the references,\n"
           "may write.");
}

void bind_writing(py::class_<Scatter>& type) {
  type.def(
          "measure", &measure, py::arg("staged"), py::arg("destinations"), py::arg("threads") = 0,
          "uint64[rounds, tensors of the plan's source]: what the staged changes would add to the\n"
          "digests of what the destination holds, mod 2^64. Writes nothing. destinations: from\n"
          "(rank, buffer name) to C-contiguous, writable buffers of the layout's size, all that\n"
          "the plan writes. staged: at most one record per rank; references are left out.\n"
          "SnapshotError: a payload is malformed. BufferMismatchError: a buffer is missing, of\n"
          "another size, read-only or overlaps another. After a success apply does not fail.\n"
          "Releases the GIL.")
      .def("apply", &apply, py::arg("staged"), py::arg("destinations"), py::arg("threads") = 0,
           "Writes the staged changes, references left out; returns the elements written. Buffers\n"
           "that destinations lacks are passed over. Raises like measure, before anything is\n"
           "written. Releases the GIL.")
      .def(
          "land", &land, py::arg("rank"), py::arg("blocks"), py::arg("image"), py::arg("begin"),
          py::arg("destinations"), py::arg("subtract") = false, py::arg("threads") = 0,
          "Writes whole blocks from image, which holds the rank's snapshot data from byte `begin`\n"
          "on as far as a window's ranges go. Returns uint64[rounds, tensors]: the sums of what\n"
          "was written, with subtract less those of what was there. Another process may write the\n"
          "image meanwhile: what is summed is what is written. BufferMismatchError as measure,\n"
          "and for an image that is too short; nothing is written then. Releases the GIL.")
      .def(
          "fill_padding",
          [](const Scatter& self, const py::object& destinations) {
            const HeldBuffers held(self.destination(), destinations, "destination");
            const py::gil_scoped_release release;
            self.fill_padding(held.memories());
          },
          py::arg("destinations"),
          "Writes zeros to the destination's padding, which no block covers: once per full pull.");
}

}  // namespace

void bind_scatter(py::module_& module) {
  bind_parts(module);
  py::class_<Scatter> type(
      module, "Scatter",
      "Maps what changed at the trainer's ranks through a plan to one engine rank's elements.");
  type.def(py::init([](const reshard::Plan& plan, const std::vector<const reshard::Layout*>& rounds,
                       const std::optional<std::string>& implementation) {
             std::vector<reshard::Layout> layouts;
             for (const reshard::Layout* each : rounds) {
               KIMISYS_CHECK(each != nullptr, ErrorCode::kLayout, "a round is None");
               layouts.push_back(*each);
             }
             const py::gil_scoped_release release;
             return std::make_unique<Scatter>(plan, layouts, implementation.value_or(""));
           }),
           py::arg("plan"), py::arg("rounds"), py::arg("implementation") = std::nullopt,
           "plan: from the merged snapshot layout to one engine rank. rounds: parts of the plan's\n"
           "destination whose elements are summed together. LayoutError for a plan with casts or\n"
           "of several engine ranks, and for rounds of another destination. implementation: one\n"
           "of scatter_implementations(), the first by default; the environment variable\n"
           "KIMISYS_BROADCAST_IMPLEMENTATION forces one.");
  bind_reading(type);
  bind_writing(type);
  module.def(
      "scatter_implementations",
      [] {
        py::list names;
        for (const std::string_view name : broadcast::scatter_implementations()) {
          names.append(std::string(name));
        }
        return names;
      },
      "Names of Scatter's implementations on this machine, the default first.");
}

}  // namespace kimisys::bindings
