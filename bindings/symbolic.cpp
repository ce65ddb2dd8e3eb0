#include "reshard/symbolic.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/error.h"
#include "bindings.h"
#include "convert.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::bindings {
namespace {

using namespace reshard;  // NOLINT: a binding file names nearly all of it

using SharedSymbolic = std::shared_ptr<SymbolicLayout>;

void bind_blocks(py::module_& module) {
  py::class_<Instance> instance(
      module, "Instance",
      "One occurrence of a block: \"{}\" in its tensor names stands for label, in its buffer "
      "names\n"
      "for buffer_label (by default the label); its local rank i is rank ranks[i] of the side.");
  instance
      .def(py::init([](std::string label, std::vector<std::int64_t> ranks,
                       std::optional<std::string> buffer_label) {
             std::string buffers = buffer_label.value_or(label);
             return Instance{std::move(label), std::move(ranks), std::move(buffers)};
           }),
           py::arg("label"), py::arg("ranks"), py::arg("buffer_label") = std::nullopt)
      .def_readonly("label", &Instance::label)
      .def_property_readonly("ranks", [](const Instance& self) { return as_tuple(self.ranks); })
      .def_readonly("buffer_label", &Instance::buffer_label);
  bind_value(instance);

  py::class_<LayoutBlock>(
      module, "Block",
      "A layout over local ranks 0..n-1, with \"{}\" in its names and without places,\n"
      "and the instances in which it occurs.")
      .def(py::init([](SharedLayout layout, std::vector<Instance> instances) {
             return LayoutBlock{std::move(layout), std::move(instances)};
           }),
           py::arg("layout"), py::arg("instances"))
      .def_property_readonly("layout", [](const LayoutBlock& self) { return shared(self.layout); })
      .def_property_readonly("instances",
                             [](const LayoutBlock& self) { return as_tuple(self.instances); })
      .def(py::self == py::self)
      .def("__repr__", &repr<LayoutBlock>);
}

void bind_symbolic_layout(py::module_& module) {
  py::class_<SymbolicLayout, SharedSymbolic> type(
      module, "SymbolicLayout",
      "A layout of blocks that repeat, validated at construction (LayoutError) and frozen. "
      "blocks,\n"
      "their instances and places are kept in an order of its own, the same for equal values.");
  bind_form(type, "whatever is malformed raises LayoutError.");
  type.def(py::init<std::vector<LayoutBlock>, std::vector<Place>>(), py::arg("blocks"),
           py::arg("places") = py::tuple())
      .def_property_readonly("blocks",
                             [](const SymbolicLayout& self) { return as_tuple(self.blocks()); })
      .def_property_readonly("places",
                             [](const SymbolicLayout& self) { return as_tuple(self.places()); })
      .def_property_readonly("ranks",
                             [](const SymbolicLayout& self) { return as_tuple(self.ranks()); })
      .def_property_readonly(
          "tensors", [](const SymbolicLayout& self) { return as_tuple(self.tensors()); },
          "All tensors, spelled out and sorted by name.")
      .def_property_readonly("tensor_count", &SymbolicLayout::tensor_count)
      .def_property_readonly("fragment_count", &SymbolicLayout::fragment_count)
      .def_property_readonly("nbytes", &SymbolicLayout::nbytes, "Bytes of all buffers.")
      .def("of_rank", &SymbolicLayout::of_rank, py::arg("rank"),
           "One rank's buffers, fragments, padding and place, with the tensors that its fragments\n"
           "name. LayoutError if there is no such rank.")
      .def("concrete", &SymbolicLayout::concrete, "Everything spelled out.")
      .def(py::self == py::self)
      .def("__repr__", &repr<SymbolicLayout>);
}

py::dict columns(const std::vector<SymbolicPlan::Traffic>& rows) {
  py::dict table;
  const auto add = [&](const char* name, auto member) {
    py::array_t<std::int64_t> column(static_cast<py::ssize_t>(rows.size()));
    std::transform(rows.begin(), rows.end(), column.mutable_data(),
                   [member](const auto& row) { return row.*member; });
    table[name] = column;
  };
  add("source_rank", &SymbolicPlan::Traffic::source_rank);
  add("destination_rank", &SymbolicPlan::Traffic::destination_rank);
  add("bytes", &SymbolicPlan::Traffic::bytes);
  add("copies", &SymbolicPlan::Traffic::copies);
  return table;
}

void bind_symbolic_plan(py::module_& module) {
  py::class_<SymbolicPlan> type(
      module, "SymbolicPlan",
      "The copies between two symbolic layouts: what repeats is planned and proven once.");
  bind_form(type,
            "the plan is proven again. Whatever is malformed raises LayoutError or PlanError.");
  type.def_property_readonly("source",
                             [](const SymbolicPlan& self) { return shared(self.shared_source()); })
      .def_property_readonly(
          "destination", [](const SymbolicPlan& self) { return shared(self.shared_destination()); })
      .def_property_readonly("proof", &SymbolicPlan::proof, "In numbers of the whole model.")
      .def_property_readonly(
          "groups", [](const SymbolicPlan& self) { return self.groups().size(); },
          "How many templates were planned and proven; the rest are their instances.")
      .def("of_rank", &SymbolicPlan::of_rank, py::arg("destination_rank"),
           "The Plan that fills one destination rank; its source holds what this rank reads.\n"
           "PlanError if there is no such rank.",
           py::call_guard<py::gil_scoped_release>())
      .def(
          "of_source", &SymbolicPlan::of_source, py::arg("source_rank"),
          "The share that one source rank writes. Its layouts hold only the fragments that it\n"
          "reads and writes; it executes into whole buffers all the same. The lowest rank's share\n"
          "writes all padding. PlanError if there is no such rank.",
          py::call_guard<py::gil_scoped_release>())
      .def(
          "traffic", [](const SymbolicPlan& self) { return columns(self.traffic()); },
          "int64 arrays source_rank, destination_rank, bytes (as written at the destination),\n"
          "copies: one row for each pair of ranks with copies, sorted by the two ranks.")
      .def("__repr__", &repr<SymbolicPlan>);
  module.def(
      "symbolic_plan",
      [](SharedSymbolic source, SharedSymbolic destination) {
        const py::gil_scoped_release release;
        return SymbolicPlan(std::move(source), std::move(destination));
      },
      py::arg("source"), py::arg("destination"),
      "Plans the copies that fill `destination` from `source` and proves them, what repeats once;\n"
      "PlanError names tensor, region and ranks when that is impossible.");
}

}  // namespace

void bind_symbolic(py::module_& reshard) {
  bind_blocks(reshard);
  bind_symbolic_layout(reshard);
  bind_symbolic_plan(reshard);
}

}  // namespace kimisys::bindings
