// Simulations of the scheduler, lower bounds and offline schedules; part of kimisys._core.rollout.
#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "rollout.h"
#include "rollout/bounds.h"
#include "rollout/offline.h"
#include "rollout/simulator.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace rollout;  // NOLINT: a binding file names nearly all of it

using Numbers = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

// A length of 2.5 is refused, not cut. An empty list has no kind that tells.
std::vector<std::int64_t> numbers(const char* field, const py::object& sequence) {
  const py::array given = py::array::ensure(sequence);
  KIMISYS_CHECK(given, ErrorCode::kScheduler, "lots: ", field, " is ",
                py::repr(py::type::of(sequence)).cast<std::string>(), "; give an array");
  const char kind = given.dtype().kind();
  KIMISYS_CHECK(kind == 'i' || kind == 'u' || given.size() == 0, ErrorCode::kScheduler,
                "lots: ", field, " are of dtype ", py::str(given.dtype()).cast<std::string>(),
                "; tokens are counted in integers");
  KIMISYS_CHECK(given.ndim() == 1, ErrorCode::kScheduler, "lots: ", field, " has ", given.ndim(),
                " dimensions; give an array of one, group by group");
  const Numbers array(given);
  return {array.data(), array.data() + array.size()};
}

// The owner's memory, which nobody changes.
Numbers view(const std::vector<std::int64_t>& values, const py::object& owner) {
  Numbers array(static_cast<py::ssize_t>(values.size()), values.data(), owner);
  array.attr("flags").attr("writeable") = false;
  return array;
}

std::string print(const EngineModel& self) {
  std::ostringstream text;
  text << "EngineModel(step=" << self.step << ", sequence=" << self.sequence
       << ", kv_token=" << self.kv_token << ", prefill_token=" << self.prefill_token
       << ", kv_capacity=" << self.kv_capacity << ", max_sequences=" << self.max_sequences
       << ", update=" << self.update << ')';
  return text.str();
}

void bind_engine_model(py::module_& rollout) {
  const EngineModel defaults;
  py::class_<EngineModel>(
      rollout, "EngineModel",
      "The time of one engine's decode step, in seconds: step + sequence * batch + kv_token * KV\n"
      "tokens held, and prefill_token for each token whose KV is computed in it. kv_capacity in\n"
      "tokens: beyond it the youngest sequence is preempted. update: seconds to take a version.\n"
      "Costs are rounded to 1e-13 seconds.",
      py::is_final())
      .def(py::init([](double step, double sequence, double kv_token, double prefill_token,
                       std::int64_t kv_capacity, std::int64_t max_sequences, double update) {
             return EngineModel{step,        sequence,      kv_token, prefill_token,
                                kv_capacity, max_sequences, update};
           }),
           py::kw_only(), py::arg("step") = defaults.step, py::arg("sequence") = defaults.sequence,
           py::arg("kv_token") = defaults.kv_token,
           py::arg("prefill_token") = defaults.prefill_token,
           py::arg("kv_capacity") = defaults.kv_capacity,
           py::arg("max_sequences") = defaults.max_sequences, py::arg("update") = defaults.update)
      .def_readonly("step", &EngineModel::step)
      .def_readonly("sequence", &EngineModel::sequence)
      .def_readonly("kv_token", &EngineModel::kv_token)
      .def_readonly("prefill_token", &EngineModel::prefill_token)
      .def_readonly("kv_capacity", &EngineModel::kv_capacity)
      .def_readonly("max_sequences", &EngineModel::max_sequences)
      .def_readonly("update", &EngineModel::update)
      .def("__repr__", py::overload_cast<const EngineModel&>(&print));
}

std::string print(const Outage& self) {
  std::ostringstream text;
  text << "Outage(engine=" << self.engine << ", time=" << self.time << ", until=" << self.until
       << ')';
  return text.str();
}

void bind_outage(py::module_& rollout) {
  py::class_<Outage>(rollout, "Outage",
                     "An engine fails at `time` and joins again at `until`, in seconds.",
                     py::is_final())
      .def(py::init([](EngineId engine, double time, double until) {
             return Outage{engine, time, until};
           }),
           py::kw_only(), py::arg("engine"), py::arg("time"), py::arg("until"))
      .def_readonly("engine", &Outage::engine)
      .def_readonly("time", &Outage::time)
      .def_readonly("until", &Outage::until)
      .def("__repr__", py::overload_cast<const Outage&>(&print));
}

std::string print(const Simulation& self) {
  std::ostringstream text;
  text << "Simulation(engines: " << self.engines.size() << ", iterations=" << self.iterations
       << ", train_base=" << self.train_base << ", train_token=" << self.train_token
       << ", reward_latency=" << self.reward_latency << ", report_interval=" << self.report_interval
       << ", outages: " << self.outages.size() << ", oracle=" << (self.oracle ? "True" : "False")
       << ", config=" << py::repr(py::cast(self.config)).cast<std::string>() << ')';
  return text.str();
}

void bind_simulation(py::module_& rollout) {
  const Simulation defaults;
  py::class_<Simulation>(
      rollout, "Simulation",
      "A scheduler's configuration and the world around it. iterations: batches. In seconds:\n"
      "train_base and train_token (per trained token) of an iteration's training, reward_latency\n"
      "from a batch to its training, report_interval between two words of a lease (0: its end\n"
      "alone; config.lease_timeout must be longer). oracle: the predictor is told true lengths,\n"
      "as no scheduler can be.",
      py::is_final())
      .def(py::init([](const Config& config, std::vector<EngineModel> engines,
                       std::int64_t iterations, double train_base, double train_token,
                       double reward_latency, double report_interval, std::vector<Outage> outages,
                       bool oracle) {
             return Simulation{config,          std::move(engines), iterations,
                               train_base,      train_token,        reward_latency,
                               report_interval, std::move(outages), oracle};
           }),
           py::kw_only(), py::arg("config"), py::arg("engines"),
           py::arg("iterations") = defaults.iterations, py::arg("train_base") = defaults.train_base,
           py::arg("train_token") = defaults.train_token,
           py::arg("reward_latency") = defaults.reward_latency,
           py::arg("report_interval") = defaults.report_interval,
           py::arg("outages") = defaults.outages, py::arg("oracle") = defaults.oracle)
      .def_readonly("config", &Simulation::config)
      .def_readonly("engines", &Simulation::engines)
      .def_readonly("iterations", &Simulation::iterations)
      .def_readonly("train_base", &Simulation::train_base)
      .def_readonly("train_token", &Simulation::train_token)
      .def_readonly("reward_latency", &Simulation::reward_latency)
      .def_readonly("report_interval", &Simulation::report_interval)
      .def_readonly("outages", &Simulation::outages)
      .def_readonly("oracle", &Simulation::oracle)
      .def("__repr__", py::overload_cast<const Simulation&>(&print));
}

void bind_lots(py::module_& rollout) {
  py::class_<Lots>(
      rollout, "Lots",
      "Prompts and the lengths of their outputs, in the order in which they are offered.\n"
      "prompt_tokens: int64[groups]. lengths: int64[groups * samples] output tokens, as the model\n"
      "would end them; longer ones are cut at `limit`. The arrays are copied. SchedulerError for "
      "numbers that are no integers.",
      py::is_final())
      .def(py::init([](const py::object& prompt_tokens, const py::object& lengths,
                       std::int64_t samples, std::int64_t limit) {
             return Lots{numbers("prompt_tokens", prompt_tokens), numbers("lengths", lengths),
                         samples, limit};
           }),
           py::arg("prompt_tokens"), py::arg("lengths"), py::kw_only(), py::arg("samples"),
           py::arg("limit"))
      .def_property_readonly(
          "prompt_tokens",
          [](const py::object& self) { return view(self.cast<const Lots&>().prompt_tokens, self); })
      .def_property_readonly(
          "lengths",
          [](const py::object& self) { return view(self.cast<const Lots&>().lengths, self); })
      .def_readonly("samples", &Lots::samples)
      .def_readonly("limit", &Lots::limit)
      .def("__repr__", [](const Lots& self) {
        std::ostringstream text;
        text << "Lots(groups: " << self.prompt_tokens.size() << ", samples=" << self.samples
             << ", limit=" << self.limit << ')';
        return text.str();
      });
}

// A property that is a copy of a list as an array.
template <typename Of, typename T>
auto array_of(std::vector<T> Of::* member) {
  return [member](const Of& self) { return as_array(self.*member); };
}

void bind_outcome(py::module_& rollout) {
  PYBIND11_NUMPY_DTYPE(Span, engine, group, sample, start, end, tokens, version, reason);
  rollout.attr("SPAN") = py::dtype::of<Span>();
  py::class_<Outcome>(
      rollout, "Outcome",
      "What came of a simulation. Times in seconds. By iteration: rollout_seconds (from the\n"
      "trainer's readiness to the batch) and train_seconds, float64; tokens and groups handed\n"
      "over, int64. busy: float64, by engine. Until the last batch: offered groups, decoded\n"
      "tokens, prefilled tokens, and of those preempted ones, whose KV was computed again because\n"
      "a cache overflowed. spans: SPAN[n], one segment each; empty unless asked for.",
      py::is_final())
      .def_readonly("seconds", &Outcome::seconds, "Until the last batch was trained.")
      .def_property_readonly("rollout_seconds", array_of(&Outcome::rollout_seconds))
      .def_property_readonly("train_seconds", array_of(&Outcome::train_seconds))
      .def_property_readonly("tokens", array_of(&Outcome::tokens))
      .def_property_readonly("groups", array_of(&Outcome::groups))
      .def_readonly("offered", &Outcome::offered)
      .def_readonly("decoded", &Outcome::decoded)
      .def_readonly("prefilled", &Outcome::prefilled)
      .def_readonly("preempted", &Outcome::preempted)
      .def_property_readonly("busy", array_of(&Outcome::busy))
      .def_property_readonly("spans", array_of(&Outcome::spans))
      .def_readonly("ledger", &Outcome::ledger)
      .def_readonly("digest", &Outcome::digest, "The scheduler's.")
      .def_readonly("events", &Outcome::events, "That the scheduler handled.")
      .def("__repr__", [](const Outcome& self) {
        std::ostringstream text;
        text << "Outcome(seconds=" << self.seconds << ", iterations: " << self.tokens.size()
             << ", decoded=" << self.decoded << ", prefilled=" << self.prefilled
             << ", preempted=" << self.preempted << ", events=" << self.events << ')';
        return text.str();
      });
}

void bind_floors(py::module_& rollout) {
  py::class_<Bounds>(rollout, "Bounds",
                     "Seconds of rollouts that no schedule of whole iterations can beat, float64\n"
                     "by iteration: area (all work, shared out evenly) and path (the longest\n"
                     "trajectory alone). seconds: of all, with the greater of the two, updates,\n"
                     "rewards and training.",
                     py::is_final())
      .def_property_readonly("area", array_of(&Bounds::area))
      .def_property_readonly("path", array_of(&Bounds::path))
      .def_readonly("seconds", &Bounds::seconds);
  py::class_<OfflineSchedule>(
      rollout, "OfflineSchedule",
      "Of one iteration. lists: by engine, uint32 indices of its trajectories among the\n"
      "iteration's, in the order of their starts. admit: by engine, at_once (all are handed to it\n"
      "at the start) or held (each when the cache will hold it to its end).",
      py::is_final())
      .def_readonly("seconds", &OfflineSchedule::seconds, "The makespan.")
      .def_property_readonly("lists",
                             [](const OfflineSchedule& self) {
                               py::list lists;
                               for (const auto& list : self.lists) lists.append(as_array(list));
                               return lists;
                             })
      .def_property_readonly("admit", [](const OfflineSchedule& self) {
        py::list names;
        for (const Admit admit : self.admit) {
          names.append(admit == Admit::kAtOnce ? "at_once" : "held");
        }
        return names;
      });
  py::class_<Offline>(rollout, "Offline",
                      "The best schedules that were found for whole iterations. seconds: as\n"
                      "Bounds.seconds. evaluations: engine lists that were timed.",
                      py::is_final())
      .def_readonly("iterations", &Offline::iterations)
      .def_readonly("seconds", &Offline::seconds)
      .def_readonly("evaluations", &Offline::evaluations);
}

}  // namespace

void bind_simulate(py::module_& rollout) {
  bind_engine_model(rollout);
  bind_outage(rollout);
  bind_simulation(rollout);
  bind_lots(rollout);
  bind_outcome(rollout);
  bind_floors(rollout);
  rollout.def("simulate", &simulate, py::arg("simulation"), py::arg("lots"),
              py::arg("spans") = false, py::call_guard<py::gil_scoped_release>(),
              "Runs the scheduler in a simulated world; equal arguments give equal outcomes.\n"
              "SchedulerError for numbers that make no sense, and if the scheduler wants more\n"
              "groups than the lots have.");
  rollout.def("bounds", &bounds, py::arg("simulation"), py::arg("lots"),
              py::call_guard<py::gil_scoped_release>(),
              "Lower bounds for whole iterations, each of the next config.groups groups.\n"
              "SchedulerError for other configurations (token_budget, over_issue, overlap).");
  rollout.def("offline", &offline, py::arg("simulation"), py::arg("lots"), py::arg("evaluations"),
              py::arg("seed") = 0, py::call_guard<py::gil_scoped_release>(),
              "The best schedules found with all lengths known, for whole iterations, by local\n"
              "search that times about `evaluations` engine lists for each. Outages are not\n"
              "looked at. SchedulerError as bounds.");
}

}  // namespace kimisys::bindings
