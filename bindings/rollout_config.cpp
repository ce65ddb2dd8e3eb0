#include <pybind11/stl.h>

#include <span>
#include <sstream>
#include <string>
#include <string_view>

#include "base/error.h"
#include "rollout.h"
#include "rollout/config.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

using namespace rollout;  // NOLINT: a binding file names nearly all of it

// visit(name, member) for a number, visit(name, member, names) for a policy.
template <typename Visitor>
void visit_fields(const Visitor& visit) {
  visit("deployment", &Config::deployment, kDeployments);
  visit("placement", &Config::placement, kPlacements);
  visit("order", &Config::order, kOrders);
  visit("staleness", &Config::staleness, kStalenesses);
  visit("concurrency", &Config::concurrency, kConcurrencies);
  visit("update", &Config::update, kUpdates);
  visit("token_budget", &Config::token_budget);
  visit("groups", &Config::groups);
  visit("over_issue", &Config::over_issue);
  visit("segment_tokens", &Config::segment_tokens);
  visit("live_limit", &Config::live_limit);
  visit("max_staleness", &Config::max_staleness);
  visit("lease_timeout", &Config::lease_timeout);
  visit("max_failures", &Config::max_failures);
  visit("prefill_cost", &Config::prefill_cost);
  visit("step_cost", &Config::step_cost);
  visit("sequence_cost", &Config::sequence_cost);
  visit("kv_cost", &Config::kv_cost);
  visit("kv_headroom", &Config::kv_headroom);
}

template <typename Choice>
Choice choice(const char* field, std::string_view given, std::span<const char* const> names) {
  std::string known;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (given == names[i]) return static_cast<Choice>(i);
    if (i > 0) known += ", ";
    known += names[i];
  }
  fail(ErrorCode::kScheduler, "config: ", field, " is ", given, "; it is one of: ", known);
}

template <typename Choice>
const char* name_of(Choice value, std::span<const char* const> names) {
  return names[static_cast<std::size_t>(value)];
}

struct Fields {  // into a dict
  const Config& config;
  py::dict& fields;
  template <typename Member>
  void operator()(const char* name, Member Config::* member) const {
    fields[name] = config.*member;
  }
  template <typename Member>
  void operator()(const char* name, Member Config::* member,
                  std::span<const char* const> names) const {
    fields[name] = name_of(config.*member, names);
  }
};

py::dict fields(const Config& self) {
  py::dict made;
  visit_fields(Fields{self, made});
  return made;
}

// The fields that are not the defaults: evaluating it gives an equal one.
std::string print(const Config& self) {
  const py::dict mine = fields(self);
  const py::dict defaults = fields(Config{});
  std::string text = "Config(";
  for (const auto& [name, value] : mine) {
    if (value.equal(defaults[name])) continue;
    if (text.back() != '(') text += ", ";
    text += py::str(name).cast<std::string>() + "=" + py::repr(value).cast<std::string>();
  }
  return text + ")";
}

Config make(const std::string& deployment, const std::string& placement, const std::string& order,
            const std::string& staleness, const std::string& concurrency, const std::string& update,
            std::int64_t token_budget, std::int64_t groups, double over_issue,
            std::int64_t segment_tokens, std::int64_t live_limit, std::int64_t max_staleness,
            std::int64_t lease_timeout, std::int64_t max_failures, double prefill_cost,
            double step_cost, double sequence_cost, double kv_cost, double kv_headroom) {
  Config made;
  made.deployment = choice<Deployment>("deployment", deployment, kDeployments);
  made.placement = choice<Placement>("placement", placement, kPlacements);
  made.order = choice<Order>("order", order, kOrders);
  made.staleness = choice<Staleness>("staleness", staleness, kStalenesses);
  made.concurrency = choice<Concurrency>("concurrency", concurrency, kConcurrencies);
  made.update = choice<Update>("update", update, kUpdates);
  made.token_budget = token_budget;
  made.groups = groups;
  made.over_issue = over_issue;
  made.segment_tokens = segment_tokens;
  made.live_limit = live_limit;
  made.max_staleness = max_staleness;
  made.lease_timeout = lease_timeout;
  made.max_failures = max_failures;
  made.prefill_cost = prefill_cost;
  made.step_cost = step_cost;
  made.sequence_cost = sequence_cost;
  made.kv_cost = kv_cost;
  made.kv_headroom = kv_headroom;
  check(made);
  return made;
}

py::object replace(const py::object& self, const py::kwargs& changes) {
  py::dict merged = fields(self.cast<const Config&>());
  for (const auto& [name, value] : changes) merged[name] = value;
  return py::type::of(self)(**merged);
}

struct ReadOnly {  // a property for each field
  py::class_<Config>& type;
  template <typename Member>
  void operator()(const char* name, Member Config::* member) const {
    type.def_readonly(name, member);
  }
  template <typename Member>
  void operator()(const char* name, Member Config::* member,
                  std::span<const char* const> names) const {
    type.def_property_readonly(
        name, [member, names](const Config& self) { return name_of(self.*member, names); });
  }
};

}  // namespace

void bind_config(py::module_& rollout) {
  const Config defaults;
  py::class_<Config> type(
      rollout, "Config",
      "What a scheduler does, composed of named policies; csrc/rollout/config.h explains each "
      "field. One of token_budget and groups must be set. Times are in microseconds. "
      "SchedulerError names a field that makes no sense, or contradicts another.",
      py::is_final());
  type.def(py::init(&make), py::kw_only(), py::arg("deployment") = "alternate",
           py::arg("placement") = "kv_aware", py::arg("order") = "probe_first",
           py::arg("staleness") = "wait", py::arg("concurrency") = "kv",
           py::arg("update") = "interrupt", py::arg("token_budget") = defaults.token_budget,
           py::arg("groups") = defaults.groups, py::arg("over_issue") = defaults.over_issue,
           py::arg("segment_tokens") = defaults.segment_tokens,
           py::arg("live_limit") = defaults.live_limit,
           py::arg("max_staleness") = defaults.max_staleness,
           py::arg("lease_timeout") = defaults.lease_timeout,
           py::arg("max_failures") = defaults.max_failures,
           py::arg("prefill_cost") = defaults.prefill_cost,
           py::arg("step_cost") = defaults.step_cost,
           py::arg("sequence_cost") = defaults.sequence_cost, py::arg("kv_cost") = defaults.kv_cost,
           py::arg("kv_headroom") = defaults.kv_headroom)
      .def("fields", &fields, "By name, with policies by theirs: Config(**fields()) is equal.")
      .def("replace", &replace, "A copy with some fields changed.")
      .def("__repr__", &print)
      .def("__eq__",
           [](const Config& self, const py::object& other) {
             return py::isinstance<Config>(other) && self == other.cast<const Config&>();
           })
      .def("__hash__", [](const Config& self) { return py::hash(py::str(print(self))); });
  visit_fields(ReadOnly{type});
}

}  // namespace kimisys::bindings
