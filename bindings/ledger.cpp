#include "rollout/ledger.h"

#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>

#include "rollout.h"
#include "rollout/scheduler.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace rollout;  // NOLINT: a binding file names nearly all of it

template <std::size_t N>
py::array_t<std::int64_t> numbers(const std::array<std::int64_t, N>& values) {
  return py::array_t<std::int64_t>(static_cast<py::ssize_t>(N), values.data());
}

// By the names of an enum whose values are the indices; `none` is left out.
template <typename Kind, std::size_t N>
py::dict by_name(const std::array<Lengths, N>& lengths) {
  py::dict made;
  for (std::size_t i = 1; i < N; ++i) {
    made[name(static_cast<Kind>(static_cast<std::uint32_t>(i)))] = lengths[i];
  }
  return made;
}

void bind_lengths(py::module_& rollout) {
  py::class_<Lengths>(rollout, "Lengths",
                      "Trajectories by output length. count: int64[33]; bucket b counts lengths of "
                      "2^(b-1) to 2^b - 1, bucket 0 length 0.",
                      py::is_final())
      .def_property_readonly("count", [](const Lengths& self) { return numbers(self.count); })
      .def_readonly("trajectories", &Lengths::trajectories)
      .def_readonly("tokens", &Lengths::tokens)
      .def("__repr__", [](const Lengths& self) {
        std::ostringstream text;
        text << "Lengths(trajectories=" << self.trajectories << ", tokens=" << self.tokens << ')';
        return text.str();
      });
}

void bind_counts(py::module_& rollout) {
  py::class_<Counts>(rollout, "Counts",
                     "Of groups that are offered and neither handed over nor dropped, of the "
                     "engines, and of the iteration.",
                     py::is_final())
      .def_readonly("groups", &Counts::groups)
      .def_readonly("complete", &Counts::complete)
      .def_readonly("trajectories", &Counts::trajectories)
      .def_readonly("waiting", &Counts::waiting)
      .def_readonly("running", &Counts::running)
      .def_readonly("engines", &Counts::engines)
      .def_readonly("iteration", &Counts::iteration)
      .def_readonly("spent", &Counts::spent)
      .def("__repr__", [](const Counts& self) {
        std::ostringstream text;
        text << "Counts(groups=" << self.groups << ", complete=" << self.complete
             << ", trajectories=" << self.trajectories << ", waiting=" << self.waiting
             << ", running=" << self.running << ", engines=" << self.engines
             << ", iteration=" << self.iteration << ", spent=" << self.spent << ')';
        return text.str();
      });
}

}  // namespace

void bind_ledger(py::module_& rollout) {
  bind_lengths(rollout);
  bind_counts(rollout);
  py::class_<Ledger>(
      rollout, "Ledger",
      "Lengths dispatched against lengths trained, and why others were dropped: a "
      "trainer that loses long trajectories teaches short answers. stale: int64[65], "
      "trained tokens by staleness in versions, the last: more.",
      py::is_final())
      .def_readonly("finished", &Ledger::finished)
      .def_readonly("trained", &Ledger::trained)
      .def_property_readonly("dropped",
                             [](const Ledger& self) { return by_name<DropReason>(self.dropped); })
      .def_property_readonly("ended",
                             [](const Ledger& self) { return by_name<EndReason>(self.ended); })
      .def_property_readonly("stale", [](const Ledger& self) { return numbers(self.stale); })
      .def_readonly("offered_groups", &Ledger::offered_groups)
      .def_readonly("trained_groups", &Ledger::trained_groups)
      .def_readonly("dropped_groups", &Ledger::dropped_groups)
      .def_readonly("segments", &Ledger::segments)
      .def_readonly("continued", &Ledger::continued)
      .def_readonly("moved", &Ledger::moved)
      .def_readonly("recomputed", &Ledger::recomputed)
      .def_readonly("requeued", &Ledger::requeued)
      .def_readonly("late", &Ledger::late)
      .def("__repr__", [](const Ledger& self) {
        std::ostringstream text;
        text << "Ledger(offered_groups=" << self.offered_groups
             << ", trained_groups=" << self.trained_groups
             << ", dropped_groups=" << self.dropped_groups << ", segments=" << self.segments
             << ", continued=" << self.continued << ", moved=" << self.moved
             << ", recomputed=" << self.recomputed << ", requeued=" << self.requeued
             << ", late=" << self.late << ')';
        return text.str();
      });
}

}  // namespace kimisys::bindings
