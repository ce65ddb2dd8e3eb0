// Block-scaled float8 of a layout's weights; part of kimisys._core.reshard.
#include "reshard/quantize.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>

#include "base/error.h"
#include "bindings.h"
#include "memory.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace reshard;  // NOLINT: a binding file names nearly all of it

// Fragment indices of (source, values, scales).
using PartIndices = std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>;

// The two layouts stay with the quantizer, which keeps its own hold on them.
class BoundQuantizer {
 public:
  BoundQuantizer(const Layout& source, const Layout& quantized, const PartIndices& indices,
                 std::int64_t block_rows, std::int64_t block_columns)
      : source_(std::make_shared<const Layout>(source)),
        quantized_(std::make_shared<const Layout>(quantized)),
        quantizer_(source_, quantized_, parts_of(indices), {block_rows, block_columns}) {}

  void fill(const py::object& sources, const py::object& destinations, std::int64_t threads,
            const std::optional<std::string>& implementation) const {
    KIMISYS_CHECK(threads >= 0, ErrorCode::kLayout, "threads is ", threads,
                  "; give a positive number, or 0 for all that the process may use");
    const HeldBuffers from(*source_, sources, "source");
    const HeldBuffers to(*quantized_, destinations, "destination");
    const py::gil_scoped_release release;
    quantizer_.fill(from.memories(), to.memories(),
                    {static_cast<std::size_t>(threads), implementation.value_or("")});
  }

 private:
  static std::vector<QuantizedPart> parts_of(const PartIndices& indices) {
    std::vector<QuantizedPart> parts;
    for (const auto& [source, values, scales] : indices) parts.push_back({source, values, scales});
    return parts;
  }

  std::shared_ptr<const Layout> source_;
  std::shared_ptr<const Layout> quantized_;
  Quantizer quantizer_;
};

}  // namespace

void bind_quantize(py::module_& module) {
  py::module_ reshard = module.attr("reshard");
  py::class_<BoundQuantizer>(reshard, "Quantizer",
                             "What kimisys.reshard.quantize computes where: parts are triples of\n"
                             "fragment indices, of the source, the values and the scales.")
      .def(py::init<const Layout&, const Layout&, const PartIndices&, std::int64_t, std::int64_t>(),
           py::arg("source"), py::arg("quantized"), py::arg("parts"), py::arg("block_rows"),
           py::arg("block_columns"))
      .def("fill", &BoundQuantizer::fill, py::arg("sources"), py::arg("destinations"),
           py::arg("threads") = 0, py::arg("implementation") = std::nullopt,
           "Computes all values and scales; see kimisys.reshard.quantize.Quantization.fill.\n"
           "Releases the GIL.");
  reshard.def(
      "check_whole_blocks",
      [](const Layout& layout, const std::set<std::string>& tensors, std::int64_t block_rows,
         std::int64_t block_columns) {
        for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
          if (!tensors.contains(layout.fragments()[i].tensor)) continue;
          check_whole_blocks(layout, i, {block_rows, block_columns});
        }
      },
      py::arg("layout"), py::arg("tensors"), py::arg("block_rows"), py::arg("block_columns"),
      "LayoutError for a fragment of these tensors that cuts a block.");
  reshard.def("quantize_implementations", &quantize_implementations,
              "Names of the quantizer's implementations, the default first. The environment\n"
              "variable KIMISYS_RESHARD_IMPLEMENTATION or the argument of fill forces one.");
}

}  // namespace kimisys::bindings
