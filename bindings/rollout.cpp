// kimisys._core.rollout: a table of contents, and the records.
#include "rollout.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>

#include "base/error.h"
#include "bindings.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace rollout;  // NOLINT: a binding file names nearly all of it

std::string print(const Action& action) {
  std::ostringstream text;
  text << "Action(" << name(action.kind);
  if (action.engine != kNoEngine) text << ", engine=" << action.engine;
  if (action.lease != kNoLease) text << ", lease=" << action.lease;
  const ActionKind kind = action.kind;
  if (kind != ActionKind::kBatch && kind != ActionKind::kUpdate && kind != ActionKind::kWant) {
    text << ", group=" << action.group;
    if (kind != ActionKind::kHandOver && kind != ActionKind::kDrop) {
      text << ", sample=" << action.sample;
    }
  }
  if (action.tokens != 0) text << ", tokens=" << action.tokens;
  if (action.limit != 0) text << ", limit=" << action.limit;
  if (action.count != 0) text << ", count=" << action.count;
  if (action.version != kNoVersion) text << ", version=" << action.version;
  if (action.drop != DropReason::kNone) text << ", drop=" << name(action.drop);
  text << ')';
  return text.str();
}

std::vector<Action> as_actions(const py::array& actions) {
  const auto given = records<Action>(actions, "ACTION");
  return {given.data(), given.data() + given.size()};
}

void bind_kinds(py::module_& rollout) {
  py::native_enum<EventKind>(rollout, "EventKind", "enum.IntEnum", "What an EVENT says.")
      .value("TIME", EventKind::kTime)
      .value("OFFERED", EventKind::kOffered)
      .value("TOKENS", EventKind::kTokens)
      .value("SEGMENT_ENDED", EventKind::kSegmentEnded)
      .value("ENGINE_JOINED", EventKind::kEngineJoined)
      .value("ENGINE_LEFT", EventKind::kEngineLeft)
      .value("ENGINE_FAILED", EventKind::kEngineFailed)
      .value("ENGINE_UPDATED", EventKind::kEngineUpdated)
      .value("VERSION_PUBLISHED", EventKind::kVersionPublished)
      .value("TRAINER_READY", EventKind::kTrainerReady)
      .value("ENGINE_STATS", EventKind::kEngineStats)
      .finalize();
  py::native_enum<EndReason>(rollout, "EndReason", "enum.IntEnum", "Why a segment ended.")
      .value("NONE", EndReason::kNone)
      .value("STOP", EndReason::kStop)
      .value("LENGTH", EndReason::kLength)
      .value("PAUSED", EndReason::kPaused)
      .value("REPETITION", EndReason::kRepetition)
      .value("FAILED", EndReason::kFailed)
      .finalize();
  py::native_enum<ActionKind>(rollout, "ActionKind", "enum.IntEnum", "What an ACTION asks for.")
      .value("START", ActionKind::kStart)
      .value("CONTINUE", ActionKind::kContinue)
      .value("PAUSE", ActionKind::kPause)
      .value("ABORT", ActionKind::kAbort)
      .value("REQUEUE", ActionKind::kRequeue)
      .value("HAND_OVER", ActionKind::kHandOver)
      .value("BATCH", ActionKind::kBatch)
      .value("DROP", ActionKind::kDrop)
      .value("UPDATE", ActionKind::kUpdate)
      .value("WANT", ActionKind::kWant)
      .finalize();
  py::native_enum<DropReason>(rollout, "DropReason", "enum.IntEnum", "Why a group was dropped.")
      .value("NONE", DropReason::kNone)
      .value("STALE", DropReason::kStale)
      .value("FAILURES", DropReason::kFailures)
      .value("EMPTY", DropReason::kEmpty)
      .finalize();
}

void bind_action(py::module_& rollout) {
  py::class_<Action>(rollout, "Action",
                     "One ACTION. kind and drop are names; engine, lease and version are -1 where "
                     "there is none; deadline is in microseconds.",
                     py::is_final())
      .def_property_readonly("kind", [](const Action& self) { return name(self.kind); })
      .def_property_readonly("engine", [](const Action& self) { return or_none(self.engine); })
      .def_property_readonly("lease", [](const Action& self) { return lease_or_none(self.lease); })
      .def_readonly("group", &Action::group)
      .def_readonly("sample", &Action::sample)
      .def_readonly("tokens", &Action::tokens)
      .def_readonly("limit", &Action::limit)
      .def_property_readonly("deadline",
                             [](const Action& self) -> std::optional<std::int64_t> {
                               if (self.deadline == kNever) return std::nullopt;
                               return self.deadline;
                             })
      .def_readonly("version", &Action::version)
      .def_readonly("count", &Action::count)
      .def_property_readonly("drop", [](const Action& self) { return name(self.drop); })
      .def("__eq__",
           [](const Action& self, const py::object& other) {
             return py::isinstance<Action>(other) &&
                    std::memcmp(&self, other.cast<const Action*>(), sizeof(Action)) == 0;
           })
      .def("__repr__", &print);
  rollout.def("as_actions", &as_actions, py::arg("actions"),
              "ACTION[n] as objects; SchedulerError for another array.");
}

}  // namespace

void bind_records(py::module_& rollout) {
  PYBIND11_NUMPY_DTYPE(Event, time, kind, engine, id, tokens, limit, count, version, reason,
                       unused);
  PYBIND11_NUMPY_DTYPE(Action, kind, engine, lease, group, tokens, limit, deadline, version, count,
                       sample, drop);
  rollout.attr("EVENT") = py::dtype::of<Event>();
  rollout.attr("ACTION") = py::dtype::of<Action>();
  bind_kinds(rollout);
  bind_action(rollout);
}

void bind_rollout(py::module_& module) {
  py::module_ rollout = module.def_submodule("rollout", "The scheduler of rollouts.");
  bind_records(rollout);
  bind_config(rollout);
  bind_ledger(rollout);
  bind_scheduler(rollout);
  bind_repetition(rollout);
  bind_simulate(rollout);
}

}  // namespace kimisys::bindings
