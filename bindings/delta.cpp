#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/thread_pool.h"
#include "bindings.h"
#include "broadcast/blocks.h"
#include "broadcast/code.h"
#include "broadcast/diff.h"
#include "convert.h"
#include "memory.h"
#include "reshard/stream.h"

namespace kimisys::bindings {
namespace {

using broadcast::Blocks;
using broadcast::ChunkDelta;
using broadcast::Descriptor;
using broadcast::Diff;
using broadcast::DiffKernel;
using reshard::Layout;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> as_array(std::span<const T> values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::bytes as_bytes(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::span<const std::byte> bytes_of(const py::bytes& bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  return {reinterpret_cast<const std::byte*>(view.data()), view.size()};
}

// The buffers and kernel of one call, held and checked.
struct Call {
  Call(const Diff& diff, const Layout& live_layout, const Layout& snapshot_layout,
       const py::object& live, const py::buffer& snapshot, std::int64_t asked_threads,
       const std::optional<std::string>& implementation)
      : kernel(broadcast::diff_kernel(implementation.value_or(""))),
        held_live(live_layout, live, "live"),
        held_snapshot(snapshot_layout, by_key(snapshot_layout, snapshot), "snapshot"),
        live_memory(diff.live_memory(held_live.memories())),
        threads(static_cast<std::size_t>(asked_threads)) {
    KIMISYS_CHECK(asked_threads >= 0, ErrorCode::kLayout, "threads is ", asked_threads,
                  "; give a positive number, or 0 for all that the process may use");
    const reshard::Memory& memory = *held_snapshot.memories().at(0);
    KIMISYS_CHECK(memory.nbytes == diff.snapshot_nbytes() && memory.writable,
                  ErrorCode::kBufferMismatch, "the snapshot has ", memory.nbytes, " ",
                  memory.writable ? "writable" : "read-only", " bytes, the diff needs ",
                  diff.snapshot_nbytes(), " writable ones");
    snapshot_data = memory.data;
  }

  static py::dict by_key(const Layout& layout, const py::buffer& snapshot) {
    py::dict buffers;
    const reshard::Buffer& buffer = layout.buffers().at(0);
    buffers[py::make_tuple(buffer.rank, buffer.name)] = snapshot;
    return buffers;
  }

  const DiffKernel& kernel;
  HeldBuffers held_live;
  HeldBuffers held_snapshot;
  std::vector<const std::byte*> live_memory;
  std::size_t threads;
  std::byte* snapshot_data = nullptr;
};

// The changes of all chunks.
struct Changes {
  Changes() = default;
  Changes(Changes&&) = default;  // chunks cannot be copied

  std::vector<ChunkDelta> chunks;
  std::vector<std::uint64_t> increments;
  std::int64_t changed = 0;
  std::int64_t nbytes = 0;
};

// A Diff with the layouts that its calls check their buffers against. Calls take turns: they share
// the digest sums of the blocks.
class BoundDiff {
 public:
  BoundDiff(const SharedLayout& live, const SharedLayout& snapshot,
            const std::optional<SharedLayout>& counted)
      : live_(live),
        snapshot_(snapshot),
        diff_(*live, *snapshot, counted ? **counted : snapshot->cover()) {}

  const Diff& diff() const { return diff_; }

  Array<std::uint64_t> copy(const py::object& live, const py::buffer& snapshot,
                            std::int64_t threads,
                            const std::optional<std::string>& implementation) {
    const Call call(diff_, *live_, *snapshot_, live, snapshot, threads, implementation);
    std::vector<std::uint64_t> digests(diff_.tensor_count(), 0);
    {
      const py::gil_scoped_release release;
      const std::lock_guard turn(turn_);
      std::mutex adding;
      parallel_for(diff_.blocks().chunk_count(), call.threads, [&](std::size_t chunk) {
        std::vector<std::uint64_t> sums(digests.size(), 0);
        diff_.copy(chunk, call.live_memory, call.snapshot_data, sums, call.kernel);
        reshard::finish_streaming();
        const std::lock_guard lock(adding);
        for (std::size_t t = 0; t < sums.size(); ++t) digests[t] += sums[t];
      });
    }
    return as_array<std::uint64_t>(digests);
  }

  Changes compare(const py::object& live, const py::buffer& snapshot, std::int64_t threads,
                  const std::optional<std::string>& implementation) {
    const Call call(diff_, *live_, *snapshot_, live, snapshot, threads, implementation);
    Changes changes;
    const py::gil_scoped_release release;
    const std::lock_guard turn(turn_);
    changes.chunks.resize(diff_.blocks().chunk_count());
    parallel_for(changes.chunks.size(), call.threads, [&](std::size_t chunk) {
      ChunkDelta& out = changes.chunks[chunk];
      out.scratch = take_scratch();
      diff_.compare(chunk, call.live_memory, call.snapshot_data, out, call.kernel);
      give_scratch(std::move(out.scratch));
    });
    changes.increments.resize(diff_.tensor_count(), 0);
    for (const ChunkDelta& chunk : changes.chunks) {
      for (const auto& [tensor, grown] : chunk.increments) changes.increments[tensor] += grown;
      changes.changed += chunk.changed;
      changes.nbytes += static_cast<std::int64_t>(chunk.payload.size());
    }
    return changes;
  }

 private:
  std::vector<broadcast::ChangeList> take_scratch() {
    const std::lock_guard lock(scratch_lock_);
    if (scratch_.empty()) return {};
    std::vector<broadcast::ChangeList> last = std::move(scratch_.back());
    scratch_.pop_back();
    return last;
  }

  void give_scratch(std::vector<broadcast::ChangeList> scratch) {
    const std::lock_guard lock(scratch_lock_);
    scratch_.push_back(std::move(scratch));
  }

  SharedLayout live_;
  SharedLayout snapshot_;
  Diff diff_;
  std::mutex turn_;
  std::mutex scratch_lock_;
  std::vector<std::vector<broadcast::ChangeList>> scratch_;
};

Array<std::uint32_t> descriptors_of(const Changes& changes) {
  std::vector<std::uint32_t> all;
  for (const ChunkDelta& chunk : changes.chunks) {
    all.insert(all.end(), chunk.descriptors.begin(), chunk.descriptors.end());
  }
  return as_array<std::uint32_t>(all);
}

py::list payloads_of(const Changes& changes) {
  py::list payloads;
  for (const ChunkDelta& chunk : changes.chunks) {
    std::span<const std::byte> rest = chunk.payload;
    for (const std::uint32_t word : chunk.descriptors) {
      const std::size_t nbytes = Descriptor::of(word).nbytes;
      payloads.append(as_bytes(rest.first(nbytes)));
      rest = rest.subspan(nbytes);
    }
  }
  return payloads;
}

py::tuple diff_once(const SharedLayout& live_layout, const SharedLayout& snapshot_layout,
                    const py::object& live_buffers, const py::buffer& snapshot_buffer,
                    std::int64_t threads, const std::optional<std::string>& implementation) {
  BoundDiff diff(live_layout, snapshot_layout, std::nullopt);
  const Changes changes = diff.compare(live_buffers, snapshot_buffer, threads, implementation);
  return py::make_tuple(descriptors_of(changes), payloads_of(changes), changes.changed);
}

py::tuple decode_block(std::uint32_t descriptor, const py::bytes& payload, std::int64_t elements,
                       std::int64_t itemsize) {
  KIMISYS_CHECK(elements >= 0 && elements <= broadcast::kMaxBlockElements &&
                    (itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8),
                ErrorCode::kSnapshot, "no block has ", elements, " elements of ", itemsize,
                " bytes");
  std::vector<std::uint32_t> scratch;
  const broadcast::Decoded decoded =
      broadcast::decode(Descriptor::of(descriptor), bytes_of(payload), elements, itemsize, scratch);
  const std::size_t nbytes = decoded.positions.size() * static_cast<std::size_t>(itemsize);
  return py::make_tuple(as_array(decoded.positions), as_bytes({decoded.values, nbytes}));
}

void bind_blocks(py::module_& module) {
  py::class_<Blocks>(module, "Blocks",
                     "How a rank's snapshot is cut into blocks, the units of a delta, and these\n"
                     "into chunks: a function of the rank's snapshot layout alone.")
      .def(py::init([](const SharedLayout& layout) { return Blocks(*layout); }), py::arg("layout"))
      .def("__len__", [](const Blocks& self) { return self.blocks().size(); })
      .def_property_readonly(
          "fragments",
          [](const Blocks& self) {
            std::vector<std::int64_t> fragments;
            for (const broadcast::Block& block : self.blocks()) {
              fragments.push_back(static_cast<std::int64_t>(block.fragment));
            }
            return as_array<std::int64_t>(fragments);
          },
          "int64[blocks]: indices in layout.fragments.")
      .def_property_readonly(
          "regions",
          [](const Blocks& self) {
            py::tuple regions(self.blocks().size());
            for (std::size_t i = 0; i < self.blocks().size(); ++i) {
              regions[i] = py::cast(self.blocks()[i].region);
            }
            return regions;
          },
          "The box of each block, in coordinates of its tensor.")
      .def_property_readonly(
          "chunk_begins",
          [](const Blocks& self) {
            return Array<std::size_t>(static_cast<py::ssize_t>(self.chunk_begins().size()),
                                      self.chunk_begins().data());
          },
          "uint64[chunks + 1]: chunk c is blocks chunk_begins[c] to chunk_begins[c + 1].");
}

void bind_diff(py::module_& module) {
  py::class_<Changes>(module, "Changes", "What one comparison found in each block.")
      .def_property_readonly("descriptors", &descriptors_of, "uint32[blocks].")
      .def_property_readonly("payloads", &payloads_of, "bytes of each block.")
      .def_property_readonly(
          "increments",
          [](const Changes& self) { return as_array<std::uint64_t>(self.increments); },
          "uint64[tensors]: what the digests of the counted elements grow by.")
      .def_readonly("changed", &Changes::changed, "Elements.")
      .def_readonly("nbytes", &Changes::nbytes, "Of all payloads.");
  py::class_<BoundDiff>(module, "Diff",
                        "One rank's live fragments paired with those of its snapshot. LayoutError\n"
                        "unless each snapshot fragment has a live one of its region whose dtype\n"
                        "can be cast. counted: what the digests count, snapshot.cover() if None.")
      .def(py::init<const SharedLayout&, const SharedLayout&, const std::optional<SharedLayout>&>(),
           py::arg("live"), py::arg("snapshot"), py::arg("counted") = std::nullopt)
      .def("copy", &BoundDiff::copy, py::arg("live"), py::arg("snapshot"), py::arg("threads") = 0,
           py::arg("implementation") = std::nullopt,
           "Fills the snapshot; returns its digests, uint64[tensors]. Releases the GIL.")
      .def("compare", &BoundDiff::compare, py::arg("live"), py::arg("snapshot"),
           py::arg("threads") = 0, py::arg("implementation") = std::nullopt,
           "Brings the snapshot up to date, writing only what changed. Releases the GIL.");
  module.def("diff", &diff_once, py::arg("live_layout"), py::arg("snapshot_layout"),
             py::arg("live_buffers"), py::arg("snapshot_buffer"), py::arg("threads") = 0,
             py::arg("implementation") = std::nullopt,
             "Compares once and brings the snapshot up to date: (descriptors uint32[blocks], the\n"
             "payload bytes of each block, changed elements). See Diff.");
  module.def(
      "diff_implementations",
      [] {
        py::list names;
        for (const std::string_view name : broadcast::diff_implementations()) {
          names.append(std::string(name));
        }
        return names;
      },
      "Names of the diff's implementations on this machine, the default first. The\n"
      "environment variable KIMISYS_BROADCAST_IMPLEMENTATION or the argument forces one.");
  module.def("decode_block", &decode_block, py::arg("descriptor"), py::arg("payload"),
             py::arg("elements"), py::arg("itemsize"),
             "(positions uint32[changed], values bytes) of gaps or a bitmap; SnapshotError for\n"
             "anything else and for what is malformed.");
}

}  // namespace

void bind_delta(py::module_& broadcast) {
  bind_blocks(broadcast);
  bind_diff(broadcast);
}

}  // namespace kimisys::bindings
