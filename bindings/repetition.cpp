#include "rollout/repetition.h"

#include <pybind11/numpy.h>
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "bindings.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using rollout::Repetition;
using rollout::RepetitionConfig;
using rollout::RepetitionDetector;

std::string config_repr(const RepetitionConfig& config) {
  std::ostringstream text;
  text << "RepetitionConfig(max_period=" << config.max_period
       << ", min_tokens=" << config.min_tokens << ", min_repeats=" << config.min_repeats
       << ", agreement=" << config.agreement << ")";
  return text.str();
}

std::string repetition_repr(const Repetition& found) {
  std::ostringstream text;
  text << "Repetition(position=" << found.position << ", start=" << found.start
       << ", period=" << found.period << ", agreement=" << found.agreement << ")";
  return text.str();
}

// Token ids as the detector takes them. Integers alone: a float array would be cut in silence.
std::vector<std::int32_t> token_ids(const py::object& tokens) {
  const py::array given = py::array::ensure(tokens);
  if (!given) PyErr_Clear();
  KIMISYS_CHECK(given && given.ndim() == 1, ErrorCode::kScheduler,
                "tokens must be a sequence or an array of one dimension of integers");
  const char kind = given.dtype().kind();
  KIMISYS_CHECK(given.size() == 0 || kind == 'i' || kind == 'u', ErrorCode::kScheduler,
                "tokens are ", std::string(py::str(given.dtype())), "; give integers");
  const auto wide = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>(given);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(wide.size()));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::int64_t id = wide.data()[i];
    KIMISYS_CHECK(id >= 0 && id <= std::numeric_limits<std::int32_t>::max(), ErrorCode::kScheduler,
                  "token ", i, " is ", id, "; token ids are 0 to 2^31 - 1");
    ids[i] = static_cast<std::int32_t>(id);
  }
  return ids;
}

std::optional<Repetition> feed(RepetitionDetector& detector, const py::object& tokens) {
  const std::vector<std::int32_t> ids = token_ids(tokens);
  return detector.feed(ids);
}

}  // namespace

void bind_repetition(py::module_& rollout) {
  const RepetitionConfig defaults;
  py::class_<RepetitionConfig>(rollout, "RepetitionConfig", py::is_final(),
                               "What counts as a loop; see csrc/rollout/repetition.h.")
      .def(py::init([](std::int64_t max_period, std::int64_t min_tokens, std::int64_t min_repeats,
                       double agreement) {
             const RepetitionConfig config = {.max_period = max_period,
                                              .min_tokens = min_tokens,
                                              .min_repeats = min_repeats,
                                              .agreement = agreement};
             rollout::check(config);
             return config;
           }),
           py::kw_only(), py::arg("max_period") = defaults.max_period,
           py::arg("min_tokens") = defaults.min_tokens,
           py::arg("min_repeats") = defaults.min_repeats, py::arg("agreement") = defaults.agreement)
      .def_readonly("max_period", &RepetitionConfig::max_period)
      .def_readonly("min_tokens", &RepetitionConfig::min_tokens)
      .def_readonly("min_repeats", &RepetitionConfig::min_repeats)
      .def_readonly("agreement", &RepetitionConfig::agreement)
      .def("__repr__", &config_repr)
      .def(py::self == py::self)
      .def("__hash__",
           [](const RepetitionConfig& config) { return py::hash(py::str(config_repr(config))); });
  py::class_<Repetition>(rollout, "Repetition", py::is_final(), "A loop that was found.")
      .def_readonly("position", &Repetition::position, "Tokens seen when it was found.")
      .def_readonly("start", &Repetition::start, "Of the loop, as a position.")
      .def_readonly("period", &Repetition::period, "Tokens; the shortest that holds.")
      .def_readonly("agreement", &Repetition::agreement, "Measured, over the window.")
      .def("__repr__", &repetition_repr);
  py::class_<RepetitionDetector>(
      rollout, "RepetitionDetector", py::is_final(),
      "Sees a text that loops, token by token; tens of kilobytes, whatever its length.")
      .def(py::init([](const std::optional<RepetitionConfig>& config) {
             return RepetitionDetector(config.value_or(RepetitionConfig{}));
           }),
           py::arg("config") = py::none())
      .def("feed", &feed, py::arg("tokens"),
           "Continues with more token ids, any integers of one dimension. The first loop found, "
           "from then on always; None as long as there is none.")
      .def_property_readonly("found", [](const RepetitionDetector& self) { return self.found(); })
      .def_property_readonly("position", &RepetitionDetector::position, "Tokens looked at.")
      .def_property_readonly("config", &RepetitionDetector::config);
}

}  // namespace kimisys::bindings
