#include "rollout/scheduler.h"

#include <pybind11/stl.h>

#include <array>
#include <mutex>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "rollout.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace rollout;  // NOLINT: a binding file names nearly all of it

EndReason reason_of(const std::string& given) {
  for (std::uint32_t i = 1; i <= static_cast<std::uint32_t>(EndReason::kFailed); ++i) {
    if (given == name(static_cast<EndReason>(i))) return static_cast<EndReason>(i);
  }
  fail(ErrorCode::kScheduler, "a segment ends with reason ", given,
       "; it is one of: stop, length, paused, repetition, failed");
}

const char* name_of(BlockerKind kind) {
  constexpr std::array names = {"trainer", "engines", "prompts", "update",
                                "pausing", "running", "waiting"};
  return names.at(static_cast<std::size_t>(kind));
}

// A scheduler has no lock, and Python lets go of its own while events are handled.
class Guarded {
 public:
  explicit Guarded(const Config& config) : scheduler_(config) {}

  template <typename Work>
  auto with(const Work& work) {
    const std::lock_guard lock(mutex_);
    return work(scheduler_);
  }

 private:
  std::mutex mutex_;
  Scheduler scheduler_;
};

std::vector<Action> one(Guarded& self, const Event& event) {
  std::vector<Action> actions;
  self.with([&](Scheduler& scheduler) { scheduler.handle(event, actions); });
  return actions;
}

struct Handled {
  std::vector<Action> actions;
  std::vector<std::int64_t> answers;  // by action: the index of its event
  std::size_t taken = 0;              // events
  std::optional<Error> error;
};

// Raises what the core raised with what was decided before: callers must not lose it.
[[noreturn]] void raise(const Handled& handled) {
  const py::object kind = py::module_::import("kimisys._core").attr("SchedulerError");
  const py::object raised = kind(handled.error->what());
  raised.attr("taken") = handled.taken;
  raised.attr("actions") = as_array(handled.actions);
  raised.attr("answers") = as_array(handled.answers);
  PyErr_SetObject(kind.ptr(), raised.ptr());
  throw py::error_already_set();
}

Handled handled(Guarded& self, const py::array& events) {
  const auto array = records<Event>(events, "EVENT");
  const std::span<const Event> given(array.data(), static_cast<std::size_t>(array.size()));
  Handled made;
  {
    const py::gil_scoped_release release;
    try {
      self.with([&](Scheduler& scheduler) {
        for (; made.taken < given.size(); ++made.taken) {
          scheduler.handle(given[made.taken], made.actions);
          made.answers.resize(made.actions.size(), static_cast<std::int64_t>(made.taken));
        }
      });
    } catch (const Error& caught) {
      made.error = caught;
    }
  }
  if (made.error) raise(made);
  return made;
}

py::array handle(Guarded& self, const py::array& events) {
  return as_array(handled(self, events).actions);
}

std::pair<py::array, py::array> handle_each(Guarded& self, const py::array& events) {
  const Handled made = handled(self, events);
  return {as_array(made.actions), as_array(made.answers)};
}

using Time = std::int64_t;
using Count = std::int64_t;

// One method per event. Of prompts and their leases.
void bind_words(py::class_<Guarded>& type) {
  type.def(
          "offered",
          [](Guarded& self, Time time, GroupId group, Count samples, Count prompt_tokens,
             Count limit) {
            return one(self, {.time = time,
                              .kind = EventKind::kOffered,
                              .id = group,
                              .tokens = prompt_tokens,
                              .limit = limit,
                              .count = samples});
          },
          py::arg("time"), py::arg("group"), py::arg("samples"), py::arg("prompt_tokens"),
          py::arg("limit"), "A prompt: `samples` trajectories of at most `limit` output tokens.")
      .def(
          "tokens",
          [](Guarded& self, Time time, Lease lease, Count count) {
            return one(self,
                       {.time = time, .kind = EventKind::kTokens, .id = lease, .tokens = count});
          },
          py::arg("time"), py::arg("lease"), py::arg("count"), "`count` more output tokens.")
      .def(
          "ended",
          [](Guarded& self, Time time, Lease lease, const std::string& reason, Count tokens) {
            return one(self, {.time = time,
                              .kind = EventKind::kSegmentEnded,
                              .id = lease,
                              .tokens = tokens,
                              .reason = reason_of(reason)});
          },
          py::arg("time"), py::arg("lease"), py::arg("reason"), py::arg("tokens") = 0,
          "By stop, length, paused, repetition or failed; tokens: since the last `tokens`.");
}

void bind_engine_events(py::class_<Guarded>& type) {
  type.def(
          "joined",
          [](Guarded& self, Time time, EngineId engine, std::int64_t version, Count kv_capacity,
             Count max_sequences) {
            return one(self, {.time = time,
                              .kind = EventKind::kEngineJoined,
                              .engine = engine,
                              .tokens = kv_capacity,
                              .count = max_sequences,
                              .version = version});
          },
          py::arg("time"), py::arg("engine"), py::arg("version"), py::arg("kv_capacity"),
          py::arg("max_sequences"), "An engine that serves `version` (-1: none yet).")
      .def(
          "left",
          [](Guarded& self, Time time, EngineId engine) {
            return one(self, {.time = time, .kind = EventKind::kEngineLeft, .engine = engine});
          },
          py::arg("time"), py::arg("engine"), "What runs there is paused and goes elsewhere.")
      .def(
          "failed",
          [](Guarded& self, Time time, EngineId engine) {
            return one(self, {.time = time, .kind = EventKind::kEngineFailed, .engine = engine});
          },
          py::arg("time"), py::arg("engine"), "The engine is gone, with what ran there.")
      .def(
          "updated",
          [](Guarded& self, Time time, EngineId engine, std::int64_t version) {
            return one(self, {.time = time,
                              .kind = EventKind::kEngineUpdated,
                              .engine = engine,
                              .version = version});
          },
          py::arg("time"), py::arg("engine"), py::arg("version"), "It serves `version`.")
      .def(
          "stats",
          [](Guarded& self, Time time, EngineId engine, Count kv_tokens) {
            return one(self, {.time = time,
                              .kind = EventKind::kEngineStats,
                              .engine = engine,
                              .tokens = kv_tokens});
          },
          py::arg("time"), py::arg("engine"), py::arg("kv_tokens"),
          "Tokens in the engine's KV cache, as it counts.");
}

// Of the trainer and of the clock.
void bind_trainer_events(py::class_<Guarded>& type) {
  type.def(
          "published",
          [](Guarded& self, Time time, std::int64_t version) {
            return one(self,
                       {.time = time, .kind = EventKind::kVersionPublished, .version = version});
          },
          py::arg("time"), py::arg("version"), "Engines are to follow.")
      .def(
          "ready",
          [](Guarded& self, Time time) {
            return one(self, {.time = time, .kind = EventKind::kTrainerReady});
          },
          py::arg("time"), "The trainer takes a batch; with it an iteration begins.")
      .def(
          "elapsed",
          [](Guarded& self, Time time) {
            return one(self, {.time = time, .kind = EventKind::kTime});
          },
          py::arg("time"), "Deadlines are looked at.");
}

void bind_blocker(py::module_& rollout) {
  py::class_<Blocker>(rollout, "Blocker", "What an iteration waits for. since: microseconds.",
                      py::is_final())
      .def_property_readonly("kind", [](const Blocker& self) { return name_of(self.kind); })
      .def_readonly("since", &Blocker::since)
      .def_property_readonly("engine", [](const Blocker& self) { return or_none(self.engine); })
      .def_property_readonly("lease", [](const Blocker& self) { return lease_or_none(self.lease); })
      .def_readonly("group", &Blocker::group)
      .def_readonly("sample", &Blocker::sample)
      .def_readonly("tokens", &Blocker::tokens)
      .def("__repr__", [](const Blocker& self) {
        std::ostringstream text;
        text << "Blocker(" << name_of(self.kind) << ", since=" << self.since;
        if (self.engine != kNoEngine) text << ", engine=" << self.engine;
        if (self.lease != kNoLease) {
          text << ", lease=" << self.lease << ", group=" << self.group << ", sample=" << self.sample
               << ", tokens=" << self.tokens;
        }
        text << ')';
        return text.str();
      });
}

}  // namespace

void bind_scheduler(py::module_& rollout) {
  bind_blocker(rollout);
  py::class_<Guarded> type(
      rollout, "Scheduler",
      "The rollout scheduler: events in, actions out; no clock, no thread, no I/O. Times are "
      "microseconds of any clock that does not go back. An event that no correct caller sends "
      "raises SchedulerError and changes nothing.",
      py::is_final());
  type.def(py::init<const Config&>(), py::arg("config"))
      .def("handle", &handle, py::arg("events"),
           "EVENT[n] in order -> ACTION[m]. Lets other threads run. Where an event is refused, the "
           "SchedulerError has `taken`, the number of those before it, and `actions` and "
           "`answers`, theirs.")
      .def("handle_each", &handle_each, py::arg("events"),
           "As handle, with int64[m]: the index of the event that each action answers.")
      .def(
          "next_deadline",
          [](Guarded& self) -> std::optional<std::int64_t> {
            const auto due = self.with([](Scheduler& s) { return s.next_deadline(); });
            if (due == kNever) return std::nullopt;
            return due;
          },
          "Microseconds: when `elapsed` is due at the latest; None: nothing is pending.")
      .def(
          "blockers",
          [](Guarded& self) { return self.with([](Scheduler& s) { return s.blockers(); }); },
          "What keeps the batch from being complete, worst first.")
      .def("counts",
           [](Guarded& self) { return self.with([](Scheduler& s) { return s.counts(); }); })
      .def(
          "ledger",
          [](Guarded& self) { return self.with([](Scheduler& s) { return s.ledger(); }); },
          "The bias ledger, as it stands.")
      .def(
          "digest",
          [](Guarded& self) { return self.with([](Scheduler& s) { return s.digest(); }); },
          "64 bits over all events and actions so far: equal exactly where they are.")
      .def(
          "audit", [](Guarded& self) { self.with([](Scheduler& s) { s.audit(); }); },
          "Checks every invariant from scratch; SchedulerError names the broken one. Slow.")
      .def_property_readonly("config", [](Guarded& self) {
        return self.with([](Scheduler& s) { return s.config(); });
      });
  bind_words(type);
  bind_engine_events(type);
  bind_trainer_events(type);
}

}  // namespace kimisys::bindings
