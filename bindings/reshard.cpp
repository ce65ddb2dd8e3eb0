#include <pybind11/numpy.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <sstream>

#include "base/error.h"
#include "bindings.h"
#include "convert.h"
#include "memory.h"
#include "reshard/execute.h"
#include "reshard/layout.h"
#include "reshard/plan.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace reshard;  // NOLINT: a binding file names nearly all of it

void bind_tables(py::module_& module) {
  module.def(
      "itemsize", [](const std::string& dtype) { return itemsize(parse_dtype(dtype)); },
      py::arg("dtype"), "Bytes of one element; LayoutError for an unknown dtype.");

  py::class_<Tensor> tensor(module, "Tensor",
                            "A logical parameter in checkpoint coordinates: name, dtype, shape.");
  tensor
      .def(py::init([](std::string name, const std::string& dtype, Dims shape) {
             Tensor made{std::move(name), parse_dtype(dtype), std::move(shape)};
             check_tensor(made);
             return made;
           }),
           py::arg("name"), py::arg("dtype"), py::arg("shape"))
      .def_readonly("name", &Tensor::name)
      .def_property_readonly("dtype", dtype_of(&Tensor::dtype))
      .def_property_readonly("shape", dims_of(&Tensor::shape))
      .def_property_readonly("elements", &Tensor::elements)
      .def_property_readonly(
          "nbytes", [](const Tensor& self) { return self.elements() * itemsize(self.dtype); });
  bind_value(tensor);

  py::class_<Region> region(module, "Region",
                            "An N-d box of a tensor, in elements: offset and extent.");
  region
      .def(py::init([](Dims offset, Dims extent) {
             KIMISYS_CHECK(offset.size() == extent.size(), ErrorCode::kLayout, "a region has ",
                           offset.size(), " offsets and ", extent.size(), " extents");
             return Region{std::move(offset), std::move(extent)};
           }),
           py::arg("offset"), py::arg("extent"))
      .def_property_readonly("offset", dims_of(&Region::offset))
      .def_property_readonly("extent", dims_of(&Region::extent))
      .def_property_readonly("elements", &Region::elements);
  bind_value(region);

  py::class_<Buffer> buffer(module, "Buffer", "A named piece of one rank's memory.");
  buffer
      .def(py::init([](std::int64_t rank, std::string name, std::int64_t nbytes) {
             return Buffer{rank, std::move(name), nbytes};
           }),
           py::arg("rank"), py::arg("name"), py::arg("nbytes"))
      .def_readonly("rank", &Buffer::rank)
      .def_readonly("name", &Buffer::name)
      .def_readonly("nbytes", &Buffer::nbytes);
  bind_value(buffer);
}

void bind_parts(py::module_& module) {
  py::class_<Fragment> fragment(
      module, "Fragment",
      "Where one rank stores one region of a tensor. byte_strides has one entry per tensor\n"
      "dimension, each >= 0; byte_offset is that of the region's corner.");
  fragment
      .def(py::init([](std::string tensor, Region region, std::int64_t rank, std::string name,
                       std::int64_t byte_offset, Dims byte_strides) {
             return Fragment{std::move(tensor), std::move(region), rank,
                             std::move(name),   byte_offset,       std::move(byte_strides)};
           }),
           py::arg("tensor"), py::arg("region"), py::arg("rank"), py::arg("buffer"),
           py::arg("byte_offset"), py::arg("byte_strides"))
      .def_readonly("tensor", &Fragment::tensor)
      .def_readonly("region", &Fragment::region)
      .def_readonly("rank", &Fragment::rank)
      .def_readonly("buffer", &Fragment::buffer)
      .def_readonly("byte_offset", &Fragment::byte_offset)
      .def_property_readonly("byte_strides", dims_of(&Fragment::byte_strides));
  bind_value(fragment);

  py::class_<Padding> padding(
      module, "Padding",
      "Bytes of a buffer that hold no tensor element; written with zeros at a destination.");
  padding
      .def(py::init([](std::int64_t rank, std::string name, std::int64_t byte_offset,
                       std::int64_t nbytes) {
             return Padding{rank, std::move(name), byte_offset, nbytes};
           }),
           py::arg("rank"), py::arg("buffer"), py::arg("byte_offset"), py::arg("nbytes"))
      .def_readonly("rank", &Padding::rank)
      .def_readonly("buffer", &Padding::buffer)
      .def_readonly("byte_offset", &Padding::byte_offset)
      .def_readonly("nbytes", &Padding::nbytes);
  bind_value(padding);

  py::class_<Place> place(module, "Place", "Where a rank runs.");
  place
      .def(py::init([](std::int64_t rank, std::int64_t node, std::int64_t device,
                       std::int64_t nic) { return Place{rank, node, device, nic}; }),
           py::arg("rank"), py::arg("node") = 0, py::arg("device") = 0, py::arg("nic") = 0)
      .def_readonly("rank", &Place::rank)
      .def_readonly("node", &Place::node)
      .def_readonly("device", &Place::device)
      .def_readonly("nic", &Place::nic);
  bind_value(place);
}

using Column = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

// Integers of any width; of others numpy would cut off the fraction in silence. An empty list is an
// array of floats, and as good as any.
Column column_of(const py::object& given, const char* name) {
  const auto array = py::array::ensure(given);
  const char kind = array ? array.dtype().kind() : 'O';
  KIMISYS_CHECK(array && (array.size() == 0 || kind == 'i' || kind == 'u'), ErrorCode::kLayout,
                name, " should be an array of integers, and is one of kind '", kind,
                "'; convert it to int64");
  return Column::ensure(array);
}

void check_shape(const Column& column, const char* name, py::ssize_t dims, py::ssize_t rows) {
  KIMISYS_CHECK(column.ndim() == dims && column.shape(0) == rows, ErrorCode::kLayout, name, " has ",
                column.ndim(), " dimensions",
                column.ndim() > 0 ? " and another number of rows" : "", "; it should have ", dims,
                " and ", rows, " rows, as many as there are fragments");
}

std::vector<PaddingRow> padding_rows(const py::object& given) {
  const Column padding = column_of(given, "padding");
  KIMISYS_CHECK(padding.ndim() == 2 && padding.shape(1) == 3, ErrorCode::kLayout,
                "padding should be an array of [m, 3]: buffer, byte offset, nbytes");
  std::vector<PaddingRow> rows;
  for (py::ssize_t i = 0; i < padding.shape(0); ++i) {
    rows.push_back(
        {static_cast<std::size_t>(padding.at(i, 0)), padding.at(i, 1), padding.at(i, 2)});
  }
  return rows;
}

Layout from_arrays(std::vector<Tensor> tensors, std::vector<Buffer> buffers,
                   const py::object& tensors_of, const py::object& buffers_of,
                   const py::object& offsets, const py::object& extents,
                   const py::object& byte_offsets, const py::object& strides,
                   const std::optional<py::object>& paddings, std::vector<Place> places) {
  const Column tensor = column_of(tensors_of, "tensor");
  const Column buffer = column_of(buffers_of, "buffer");
  const Column offset = column_of(offsets, "offset");
  const Column extent = column_of(extents, "extent");
  const Column byte_offset = column_of(byte_offsets, "byte_offset");
  const Column byte_strides = column_of(strides, "byte_strides");
  const py::ssize_t count = tensor.size();
  check_shape(tensor, "tensor", 1, count);
  check_shape(buffer, "buffer", 1, count);
  check_shape(byte_offset, "byte_offset", 1, count);
  check_shape(offset, "offset", 2, count);
  check_shape(extent, "extent", 2, count);
  check_shape(byte_strides, "byte_strides", 2, count);
  std::vector<FragmentRow> rows;
  rows.reserve(static_cast<std::size_t>(count));
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(tensor.at(i));
    KIMISYS_CHECK(at < tensors.size(), ErrorCode::kLayout, "row ", i, " names tensor ",
                  tensor.at(i), " of ", tensors.size());
    const std::size_t dims = tensors[at].shape.size();
    const auto some = [&](const Column& column, const char* name) {
      KIMISYS_CHECK(column.shape(1) >= static_cast<py::ssize_t>(dims), ErrorCode::kLayout, name,
                    " has ", column.shape(1), " columns; tensor '", tensors[at].name, "' has ",
                    dims, " dimensions");
      const std::int64_t* row = column.data(i, 0);
      return Dims(row, row + dims);
    };
    rows.push_back(
        {at,
         static_cast<std::size_t>(buffer.at(i)),
         {dims == 0 ? Dims() : some(offset, "offset"), dims == 0 ? Dims() : some(extent, "extent")},
         byte_offset.at(i),
         dims == 0 ? Dims() : some(byte_strides, "byte_strides")});
  }
  const std::vector<PaddingRow> gaps =
      paddings ? padding_rows(*paddings) : std::vector<PaddingRow>();
  return Layout::of_rows(std::move(tensors), std::move(buffers), rows, gaps, std::move(places));
}

void bind_layout(py::module_& module) {
  py::class_<Layout, SharedLayout> type(
      module, "Layout",
      "All fragments of one side, validated at construction (LayoutError) and frozen.\n"
      "tensors are sorted by name, buffers by (rank, name), places by rank; fragments and\n"
      "padding keep the order given.");
  bind_form(type, "whatever is malformed raises LayoutError.");
  type.def(py::init<std::vector<Tensor>, std::vector<Buffer>, std::vector<Fragment>,
                    std::vector<Padding>, std::vector<Place>>(),
           py::arg("tensors"), py::arg("buffers"), py::arg("fragments"),
           py::arg("padding") = py::tuple(), py::arg("places") = py::tuple())
      .def_property_readonly("tensors", [](const Layout& self) { return as_tuple(self.tensors()); })
      .def_property_readonly("buffers", [](const Layout& self) { return as_tuple(self.buffers()); })
      .def_property_readonly("fragments",
                             [](const Layout& self) { return as_tuple(self.fragments()); })
      .def_property_readonly("padding", [](const Layout& self) { return as_tuple(self.padding()); })
      .def_property_readonly("places", [](const Layout& self) { return as_tuple(self.places()); })
      .def_property_readonly("ranks", [](const Layout& self) { return as_tuple(self.ranks()); })
      .def_static(
          "from_arrays", &from_arrays, py::arg("tensors"), py::arg("buffers"), py::arg("tensor"),
          py::arg("buffer"), py::arg("offset"), py::arg("extent"), py::arg("byte_offset"),
          py::arg("byte_strides"), py::arg("padding") = std::nullopt,
          py::arg("places") = py::tuple(),
          "The same from int64 arrays, for many fragments: tensor, buffer: [n], places in the\n"
          "tables given; byte_offset: [n]; offset, extent, byte_strides: [n, d], of which each\n"
          "fragment uses as many columns as its tensor has dimensions; padding: [m, 3] of\n"
          "buffer, byte offset, nbytes. LayoutError for anything else.")
      .def_static("merge", &Layout::merge, py::arg("layouts"),
                  "The union of layouts that agree on shared tensors; LayoutError otherwise.")
      .def("of_rank", &Layout::of_rank, py::arg("rank"),
           "One rank's buffers, fragments, padding and place, with the whole tensor table.")
      .def("cover", &Layout::cover,
           "Fragments trimmed so that each element held is held once; no padding.")
      .def("to_json", &Layout::to_json, "The text form, one JSON object.")
      .def_static("from_json", &Layout::from_json, py::arg("text"),
                  "Reads to_json's text; whatever is malformed raises LayoutError.")
      .def("__repr__", &repr<Layout>)
      .def(py::self == py::self)
      .def("__hash__", [](const Layout& self) { return py::hash(py::str(self.to_json())); });
}

void bind_copy(py::module_& module) {
  py::class_<Copy> copy(module, "Copy",
                        "One strided copy. Offsets are those of the region's corner, in bytes.");
  copy.def_readonly("source_fragment", &Copy::source_fragment)
      .def_readonly("destination_fragment", &Copy::destination_fragment)
      .def_readonly("tensor", &Copy::tensor)
      .def_readonly("region", &Copy::region)
      .def_property_readonly("extent",
                             [](const Copy& self) { return as_tuple(self.region.extent); })
      .def_readonly("source_rank", &Copy::source_rank)
      .def_readonly("source_buffer", &Copy::source_buffer)
      .def_readonly("source_offset", &Copy::source_offset)
      .def_property_readonly("source_strides", dims_of(&Copy::source_strides))
      .def_property_readonly("source_dtype", dtype_of(&Copy::source_dtype))
      .def_readonly("destination_rank", &Copy::destination_rank)
      .def_readonly("destination_buffer", &Copy::destination_buffer)
      .def_readonly("destination_offset", &Copy::destination_offset)
      .def_property_readonly("destination_strides", dims_of(&Copy::destination_strides))
      .def_property_readonly("destination_dtype", dtype_of(&Copy::destination_dtype));
  bind_value(copy);

  py::class_<Proof> proof(module, "Proof", "What was established about a plan, in numbers.");
  proof.def_readonly("destination_bytes", &Proof::destination_bytes)
      .def_readonly("copied_bytes", &Proof::copied_bytes)
      .def_readonly("padding_bytes", &Proof::padding_bytes)
      .def_readonly("copies", &Proof::copies);
  bind_value(proof);
}

// An execution and the Python buffers that it works on.
class BoundExecution {
 public:
  BoundExecution(const Plan& plan, const py::object& sources, const py::object& destinations,
                 std::int64_t threads, const std::optional<std::string>& implementation)
      : from_(plan.source(), sources, "source"),
        to_(plan.destination(), destinations, "destination"),
        execution_(make(plan, threads, implementation)) {}

  void run() const {
    const py::gil_scoped_release release;
    execution_.run();
  }

 private:
  Execution make(const Plan& plan, std::int64_t threads,
                 const std::optional<std::string>& implementation) const {
    KIMISYS_CHECK(threads >= 0, ErrorCode::kLayout, "threads is ", threads,
                  "; give a positive number, or 0 for all that the process may use");
    const py::gil_scoped_release release;
    return {plan,
            from_.memories(),
            to_.memories(),
            {static_cast<std::size_t>(threads), implementation.value_or("")}};
  }

  HeldBuffers from_;
  HeldBuffers to_;
  Execution execution_;
};

std::unique_ptr<BoundExecution> bind(const Plan& plan, const py::object& sources,
                                     const py::object& destinations, std::int64_t threads,
                                     const std::optional<std::string>& implementation) {
  return std::make_unique<BoundExecution>(plan, sources, destinations, threads, implementation);
}

void bind_execution(py::module_& module, py::class_<Plan>& plan) {
  py::class_<BoundExecution>(module, "Execution",
                             "A plan on its memory, checked and cut for its threads.")
      .def("run", &BoundExecution::run,
           "Fills the destination buffers; a share, the bytes that are its own. Releases the GIL.\n"
           "Not in two threads at once: both would write the same memory.");
  plan.def(
          "execute",
          [](const Plan& self, const py::object& sources, const py::object& destinations,
             std::int64_t threads, const std::optional<std::string>& implementation) {
            BoundExecution(self, sources, destinations, threads, implementation).run();
          },
          py::arg("sources"), py::arg("destinations"), py::arg("threads") = 0,
          py::arg("implementation") = std::nullopt,
          "Fills the destination buffers once. Nothing is written before everything has been\n"
          "checked. sources, destinations: from (rank, buffer name) to any C-contiguous buffer of\n"
          "exactly the layout's size, destinations writable; sources that the plan does not read,\n"
          "and destinations that a share does not write, may be absent. threads: 0 means all that\n"
          "the process may use. implementation: one of implementations(), the first by default.\n"
          "BufferMismatchError: a buffer is missing, of another size, read-only, or overlaps\n"
          "another. LayoutError: threads is negative or the implementation unknown. Releases the\n"
          "GIL.")
      .def("bind", &bind, py::arg("sources"), py::arg("destinations"), py::arg("threads") = 0,
           py::arg("implementation") = std::nullopt,
           "An Execution of this plan, to run again and again on the same memory. Arguments,\n"
           "checks and errors are those of execute; all checks are made here, none by run. It\n"
           "holds the buffers, so their memory stays. One Execution must not run in two threads\n"
           "at once. A share needs only the destination buffers that it writes.");
}

void bind_plan(py::module_& module) {
  py::class_<Plan> type(
      module, "Plan",
      "The copies from a source layout to a destination layout, proven to write each\n"
      "destination byte exactly once.");
  bind_form(type,
            "the plan is proven again. Whatever is malformed raises LayoutError or PlanError.");
  type.def_property_readonly("source",
                             [](const Plan& self) { return shared(self.shared_source()); })
      .def_property_readonly("destination",
                             [](const Plan& self) { return shared(self.shared_destination()); })
      .def_property_readonly("copies",
                             [](const Plan& self) {
                               std::vector<Copy> copies;
                               for (std::size_t i = 0; i < self.steps().size(); ++i) {
                                 copies.push_back(self.copy(i));
                               }
                               return copies;
                             })
      .def_property_readonly("nbytes", &Plan::nbytes,
                             "Bytes of tensor elements written; padding is not counted.")
      .def_property_readonly("proof", &Plan::proof)
      .def_property_readonly("share_of", &Plan::share_of,
                             "The one source rank whose bytes this share writes; None for a plan\n"
                             "of all source ranks.")
      .def("of_rank", &Plan::of_rank, py::arg("destination_rank"),
           "The part that fills one destination rank.")
      .def("of_source", &Plan::of_source, py::arg("source_rank"),
           "The share that one source rank writes, into those destination buffers alone that it\n"
           "touches. The shares of all source ranks write each destination byte exactly once; the\n"
           "lowest rank writes the padding.")
      .def("__repr__", &repr<Plan>);
  bind_execution(module, type);
  module.def(
      "plan",
      [](SharedLayout source, SharedLayout destination) {
        const py::gil_scoped_release release;
        return make_plan(std::move(source), std::move(destination));
      },
      py::arg("source"), py::arg("destination"),
      "Plans the copies that fill `destination` from `source` and proves them; PlanError names\n"
      "tensor, region and ranks when that is impossible.");
  module.def(
      "prove",
      [](const Plan& plan) {
        return prove(plan.source(), plan.destination(), plan.steps(), plan.share_of());
      },
      py::arg("plan"), "Checks a plan anew, independently of the planner; raises PlanError.");
  module.def(
      "implementations", &implementations,
      "Names of the executor's implementations, the default first. The environment\n"
      "variable KIMISYS_RESHARD_IMPLEMENTATION or the argument of bind and execute forces one.");
}

}  // namespace

void bind_reshard(py::module_& module) {
  py::module_ reshard = module.def_submodule("reshard", "Layouts, plans and their execution.");
  bind_tables(reshard);
  bind_parts(reshard);
  bind_layout(reshard);
  bind_copy(reshard);
  bind_plan(reshard);
  bind_symbolic(reshard);
  bind_table(reshard);
  bind_route(reshard);
}

}  // namespace kimisys::bindings
