#include "reshard/route.h"

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>

#include "base/error.h"
#include "bindings.h"
#include "convert.h"
#include "reshard/demand.h"
#include "reshard/plan.h"
#include "reshard/simulate.h"

namespace kimisys::bindings {
namespace {

using namespace reshard;  // NOLINT: a binding file names nearly all of it

using Turns = std::vector<std::pair<std::int64_t, std::int64_t>>;
using Ranks = std::vector<std::int64_t>;

// A column: get(i) for each i, as an array of T.
template <typename T, typename Get>
py::array_t<T> column(std::size_t count, const Get& get) {
  py::array_t<T> array(static_cast<py::ssize_t>(count));
  T* data = array.mutable_data();
  for (std::size_t i = 0; i < count; ++i) data[i] = static_cast<T>(get(i));
  return array;
}

RouteOptions options(double nic_bandwidth, double message_seconds, std::int64_t chunk, bool relay) {
  return {nic_bandwidth, message_seconds, chunk, relay};
}

using AnyPlan = std::variant<const Plan*, const SymbolicPlan*>;

Route route_plan(const AnyPlan& plan, double nic_bandwidth, double message_seconds,
                 std::int64_t chunk, bool relay) {
  const RouteOptions chosen = options(nic_bandwidth, message_seconds, chunk, relay);
  if (const auto* symbolic = std::get_if<const SymbolicPlan*>(&plan)) {
    const py::gil_scoped_release release;
    return {cluster_of(**symbolic), demands_of(**symbolic), chosen};
  }
  const Plan& whole = *std::get<const Plan*>(plan);
  KIMISYS_CHECK(!whole.share_of(), ErrorCode::kPlan, "this is the share of source rank ",
                whole.share_of().value_or(0), " of a plan; route the whole plan");
  const py::gil_scoped_release release;
  return {cluster_of(whole.source(), whole.destination()),
          demands_of(whole.source(), whole.destination()), chosen};
}

Route route_demands(std::vector<Demand> demands, std::vector<Place> source,
                    std::vector<Place> destination, double nic_bandwidth, double message_seconds,
                    std::int64_t chunk, bool relay) {
  const py::gil_scoped_release release;
  return {std::make_shared<const Cluster>(std::move(source), std::move(destination)),
          std::move(demands), options(nic_bandwidth, message_seconds, chunk, relay)};
}

py::dict endpoints(const Route& self) {
  const std::vector<Endpoint>& list = self.cluster().endpoints();
  py::dict table;
  table["destination"] =
      column<bool>(list.size(), [&](std::size_t i) { return list[i].destination; });
  table["rank"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].place.rank; });
  table["node"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].place.node; });
  table["device"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].place.device; });
  table["nic"] = column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].nic; });
  return table;
}

py::dict nics(const Route& self) {
  const std::vector<Nic>& list = self.cluster().nics();
  py::dict table;
  table["node"] = column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].node; });
  table["nic"] = column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].nic; });
  table["egress_bytes"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return self.egress()[i]; });
  table["ingress_bytes"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return self.ingress()[i]; });
  return table;
}

py::dict hops(const Route& self) {
  std::vector<std::size_t> part(self.hops());
  for (std::size_t p = 0; p < self.parts().size(); ++p) {
    const std::size_t width = self.demands()[self.parts()[p].demand].receivers.size();
    for (std::size_t i = 0; i < width; ++i) part[self.parts()[p].first_hop + i] = p;
  }
  const auto of = [&](std::size_t hop) -> const Part& { return self.parts()[part[hop]]; };
  py::dict table;
  table["part"] = column<std::int64_t>(part.size(), [&](std::size_t i) { return part[i]; });
  table["demand"] = column<std::int64_t>(part.size(), [&](std::size_t i) { return of(i).demand; });
  table["begin"] = column<std::int64_t>(part.size(), [&](std::size_t i) { return of(i).begin; });
  table["bytes"] = column<std::int64_t>(part.size(), [&](std::size_t i) { return of(i).bytes; });
  table["server"] =
      column<std::int64_t>(part.size(), [&](std::size_t i) { return self.server(i); });
  table["receiver"] =
      column<std::int64_t>(part.size(), [&](std::size_t i) { return self.receiver(i); });
  table["local"] = column<bool>(part.size(), [&](std::size_t i) { return self.local(i); });
  return table;
}

py::dict traffic(const Route& self) {
  std::unordered_map<std::uint64_t, std::size_t> numbers;
  struct Row {
    std::uint32_t server = 0;
    std::uint32_t receiver = 0;
    std::int64_t bytes = 0;
  };
  std::vector<Row> rows;
  for (const Part& part : self.parts()) {
    const std::size_t width = self.demands()[part.demand].receivers.size();
    for (std::size_t hop = part.first_hop; hop < part.first_hop + width; ++hop) {
      const Row row{self.server(hop), self.receiver(hop), 0};
      const auto [at, is_new] =
          numbers.try_emplace(std::uint64_t{row.server} << 32U | row.receiver, rows.size());
      if (is_new) rows.push_back(row);
      rows[at->second].bytes += part.bytes;
    }
  }
  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::tie(a.server, a.receiver) < std::tie(b.server, b.receiver);
  });
  py::dict table;
  table["server"] =
      column<std::int64_t>(rows.size(), [&](std::size_t i) { return rows[i].server; });
  table["receiver"] =
      column<std::int64_t>(rows.size(), [&](std::size_t i) { return rows[i].receiver; });
  table["bytes"] = column<std::int64_t>(rows.size(), [&](std::size_t i) { return rows[i].bytes; });
  return table;
}

Simulation run_simulation(const Route& self, const std::string& order, std::int64_t window) {
  KIMISYS_CHECK(order == "planned" || order == "natural", ErrorCode::kPlan, "unknown order '",
                order, "'; the orders are 'planned' and 'natural'");
  const py::gil_scoped_release release;
  return simulate(self, order == "planned" ? Order::kPlanned : Order::kNatural, window);
}

py::dict messages(const Simulation& self) {
  const std::vector<Message>& list = self.messages;
  py::dict table;
  table["start"] = column<double>(list.size(), [&](std::size_t i) { return list[i].start; });
  table["end"] = column<double>(list.size(), [&](std::size_t i) { return list[i].end; });
  table["sender"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].sender; });
  table["receiver"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].receiver; });
  table["bytes"] = column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].bytes; });
  table["first_item"] =
      column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i].first_item; });
  return table;
}

void bind_demand(py::module_& module) {
  py::class_<Demand>(module, "Demand",
                     "All elements that the same source ranks hold and the same destination ranks\n"
                     "want. owners, receivers: ranks, ascending. pieces: (turn, bytes) pairs, by\n"
                     "turn: when a reader who goes through the model in order comes by, and the\n"
                     "bytes that each receiver then gets. copies: tiles for one receiver.")
      .def(py::init([](Ranks owners, Ranks receivers, const Turns& pieces, std::int64_t copies) {
             Demand demand{std::move(owners), std::move(receivers), {}, copies};
             for (const auto& [turn, bytes] : pieces) demand.pieces.push_back({turn, bytes});
             return demand;
           }),
           py::arg("owners"), py::arg("receivers"), py::arg("pieces"), py::arg("copies") = 1)
      .def_property_readonly("owners",
                             [](const Demand& self) { return py::tuple(py::cast(self.owners)); })
      .def_property_readonly("receivers",
                             [](const Demand& self) { return py::tuple(py::cast(self.receivers)); })
      .def_property_readonly("pieces",
                             [](const Demand& self) {
                               py::list list;
                               for (const Piece& piece : self.pieces) {
                                 list.append(py::make_tuple(piece.turn, piece.bytes));
                               }
                               return py::tuple(list);
                             })
      .def_property_readonly("bytes", &Demand::bytes, "Bytes that each receiver gets.")
      .def_readonly("copies", &Demand::copies)
      .def(py::self == py::self)
      .def("__hash__", [](const Demand& self) { return py::hash(py::str(repr(self))); })
      .def("__repr__", &repr<Demand>);
}

void bind_simulation(py::module_& module) {
  py::class_<Simulation>(module, "Simulation",
                         "How a route runs in the time model. Arrays of NICs and endpoints are in\n"
                         "the order of Route.nics() and Route.endpoints().")
      .def_readonly("seconds", &Simulation::seconds)
      .def_property_readonly("message_count",
                             [](const Simulation& self) { return self.messages.size(); })
      .def_property_readonly(
          "send_seconds",
          [](const Simulation& self) {
            const auto& list = self.send_seconds;
            return column<double>(list.size(), [&](std::size_t i) { return list[i]; });
          },
          "float64 per NIC: how long it was busy sending.")
      .def_property_readonly(
          "receive_seconds",
          [](const Simulation& self) {
            const auto& list = self.receive_seconds;
            return column<double>(list.size(), [&](std::size_t i) { return list[i]; });
          },
          "float64 per NIC: how long it was busy receiving.")
      .def_property_readonly(
          "staging_bytes",
          [](const Simulation& self) {
            const auto& list = self.staging_bytes;
            return column<std::int64_t>(list.size(), [&](std::size_t i) { return list[i]; });
          },
          "int64 per endpoint: most bytes packed to be sent, or received and not\n"
          "yet unpacked, at a time.")
      .def("messages", &messages,
           "Arrays, one entry for each message, as they start: start, end (seconds), sender,\n"
           "receiver (endpoints), bytes, first_item (where its hops begin in items()).")
      .def(
          "items",
          [](const Simulation& self) {
            return column<std::int64_t>(self.items.size(),
                                        [&](std::size_t i) { return self.items[i]; });
          },
          "int64: the hops that the messages carry, message after message. A hop whose bytes need\n"
          "several messages is listed by each of them.")
      .def("__repr__", &repr<Simulation>);
}

constexpr const char* kRouteText =
    "nic_bandwidth: bytes per second and direction. message_seconds: fixed time of each message.\n"
    "chunk: bytes of the largest message. relay: whether ranks of the destination pass on what\n"
    "they have; without it each receiver is served by an owner. PlanError for demands without\n"
    "owners or with unknown ranks, and for numbers that are not positive. Releases the GIL.";

void bind_route_class(py::module_& module) {
  py::class_<Route>(
      module, "Route",
      "Who serves whom: each demand cut into parts, and for each part and receiver\n"
      "the rank that sends it. Endpoints are numbered: source ranks, then destination\n"
      "ranks, ascending.")
      .def_property_readonly("demands",
                             [](const Route& self) { return py::tuple(py::cast(self.demands())); })
      .def_property_readonly("nic_bandwidth",
                             [](const Route& self) { return self.options().nic_bandwidth; })
      .def_property_readonly("message_seconds",
                             [](const Route& self) { return self.options().message_seconds; })
      .def_property_readonly("chunk", [](const Route& self) { return self.options().chunk; })
      .def_property_readonly("relay", [](const Route& self) { return self.options().relay; })
      .def_property_readonly("part_count", [](const Route& self) { return self.parts().size(); })
      .def_property_readonly("local_bytes", &Route::local_bytes,
                             "Bytes that stay within a node and pass no NIC.")
      .def_property_readonly("remote_bytes", &Route::remote_bytes)
      .def_property_readonly("relayed_bytes", &Route::relayed_bytes,
                             "The share of remote_bytes that ranks of the destination send.")
      .def("endpoints", &endpoints, "Arrays: destination (bool), rank, node, device, nic (number).")
      .def("nics", &nics, "Arrays, one entry for each NIC: node, nic, egress_bytes, ingress_bytes.")
      .def("hops", &hops,
           "Arrays, one entry for each part and receiver: part, demand, begin, bytes (the part's\n"
           "bytes of the demand), server, receiver (endpoints), local. An element belongs to the\n"
           "part in which its first byte lies.")
      .def("traffic", &traffic,
           "Arrays, one entry for each pair: server, receiver (endpoints), bytes.")
      .def(
          "simulate", &run_simulation, py::arg("order") = "planned", py::arg("window") = 2,
          "Runs the time model: every NIC sends one message at a time and receives one at a time.\n"
          "order 'planned' serves the NICs first that have most left; 'natural' has each "
          "receiving\n"
          "NIC pull part after part in the order of the model, first come first served. window:\n"
          "messages in flight per rank and direction, each with a staging buffer. PlanError for "
          "an\n"
          "unknown order, a window that is not positive. Releases the GIL.")
      .def("__repr__", &repr<Route>);
}

}  // namespace

void bind_route(py::module_& module) {
  bind_demand(module);
  bind_simulation(module);
  bind_route_class(module);
  const RouteOptions defaults;
  module.def(
      "route", &route_plan, py::arg("plan"), py::arg("nic_bandwidth") = defaults.nic_bandwidth,
      py::arg("message_seconds") = defaults.message_seconds, py::arg("chunk") = defaults.chunk,
      py::arg("relay") = defaults.relay,
      (std::string("Routes a plan or a symbolic plan, which is not spelled out. ") + kRouteText)
          .c_str());
  module.def(
      "route_demands", &route_demands, py::arg("demands"), py::arg("source_places"),
      py::arg("destination_places"), py::arg("nic_bandwidth") = defaults.nic_bandwidth,
      py::arg("message_seconds") = defaults.message_seconds, py::arg("chunk") = defaults.chunk,
      py::arg("relay") = defaults.relay,
      (std::string("Routes demands between ranks, each with its place. ") + kRouteText).c_str());
}

}  // namespace kimisys::bindings
