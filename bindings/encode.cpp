#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <span>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "broadcast/blocks.h"
#include "broadcast/code.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using Positions = py::array_t<std::uint32_t, py::array::c_style>;

py::tuple encode_block(const Positions& positions, const py::buffer& values, std::int64_t elements,
                       std::int64_t itemsize) {
  const py::buffer_info given = values.request();
  const std::span<const std::uint32_t> places(positions.data(),
                                              static_cast<std::size_t>(positions.size()));
  KIMISYS_CHECK(elements >= 0 && elements <= broadcast::kMaxBlockElements &&
                    (itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8),
                ErrorCode::kLayout, "no block has ", elements, " elements of ", itemsize, " bytes");
  KIMISYS_CHECK(given.size * given.itemsize == positions.size() * itemsize,
                ErrorCode::kBufferMismatch, positions.size(), " changed elements of ", itemsize,
                " bytes come with ", given.size * given.itemsize,
                " bytes of values; pass one value for each");
  const bool ascend =
      std::adjacent_find(places.begin(), places.end(), std::greater_equal<>()) == places.end();
  KIMISYS_CHECK(ascend && (places.empty() || places.back() < elements), ErrorCode::kLayout,
                "positions must ascend below the block's ", elements, " elements");
  std::vector<std::byte> payload;
  const broadcast::Descriptor descriptor = broadcast::encode(
      places, static_cast<const std::byte*>(given.ptr), elements, itemsize, payload);
  return py::make_tuple(descriptor.word(),
                        py::bytes(reinterpret_cast<const char*>(payload.data()), payload.size()));
}

}  // namespace

void bind_encode(py::module_& broadcast) {
  broadcast.def("encode_block", &encode_block, py::arg("positions"), py::arg("values"),
                py::arg("elements"), py::arg("itemsize"),
                "(descriptor, payload) of a block's changed elements, as gaps or a bitmap;\n"
                "a whole block without its bits where they would not take more, for the caller to\n"
                "add. positions: uint32, ascending (LayoutError); values: contiguous, as many.");
}

}  // namespace kimisys::bindings
