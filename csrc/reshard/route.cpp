#include "reshard/route.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <ostream>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "reshard/plan.h"
#include "reshard/router.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

void check_options(const RouteOptions& options) {
  KIMISYS_CHECK(options.nic_bandwidth > 0 && options.nic_bandwidth < 1e18, kBad,
                "a NIC's bandwidth is ", options.nic_bandwidth,
                " bytes per second; give a positive number below 1e18");
  KIMISYS_CHECK(options.message_seconds >= 0 && options.message_seconds < 1e6, kBad,
                "a message takes ", options.message_seconds,
                " seconds beside its bytes; give a number from 0 to 1e6");
  KIMISYS_CHECK(options.chunk > 0, kBad, "the largest message has ", options.chunk,
                " bytes; give a positive number");
}

std::int64_t parts_of(std::int64_t bytes, std::int64_t chunk) {
  return bytes / chunk + (bytes % chunk != 0 ? 1 : 0);
}

void check_demand(const Demand& demand) {
  const auto rising = [](const std::vector<std::int64_t>& ranks) {
    return std::adjacent_find(ranks.begin(), ranks.end(), std::greater_equal<>()) == ranks.end();
  };
  KIMISYS_CHECK(!demand.owners.empty() && !demand.receivers.empty(), kBad, "a demand has ",
                demand.owners.size(), " owners ", ranks_text(demand.owners), " and ",
                demand.receivers.size(), " receivers ", ranks_text(demand.receivers),
                "; it needs one of each");
  KIMISYS_CHECK(rising(demand.owners) && rising(demand.receivers), kBad, "the owners ",
                ranks_text(demand.owners), " or the receivers ", ranks_text(demand.receivers),
                " of a demand are not ascending; sort them and leave no rank twice");
  const bool in_turn =
      std::is_sorted(demand.pieces.begin(), demand.pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.turn < b.turn; });
  KIMISYS_CHECK(in_turn, kBad, "the pieces of a demand of receivers ", ranks_text(demand.receivers),
                " are not by turn; sort them");
  std::int64_t sum = 0;
  for (const Piece& piece : demand.pieces) {
    KIMISYS_CHECK(
        piece.bytes >= 0 && !__builtin_add_overflow(sum, piece.bytes, &sum) && sum <= kMaxBytes,
        kBad, "a demand of receivers ", ranks_text(demand.receivers), " has a piece of ",
        piece.bytes, " bytes; pieces are not negative and together at most ", kMaxBytes);
  }
}

// What is counted in 32 bits and summed in 64 later. Returns the number of hops.
std::size_t check_size(const std::vector<Demand>& demands, std::int64_t chunk) {
  constexpr std::int64_t kMaxHops = std::int64_t{1} << 28U;
  std::int64_t hops = 0;
  std::int64_t bytes = 0;
  for (const Demand& demand : demands) {
    const auto width = static_cast<std::int64_t>(demand.receivers.size());
    const std::int64_t parts = parts_of(demand.bytes(), chunk);
    KIMISYS_CHECK(parts <= (kMaxHops - hops) / width, kBad, "parts of at most ", chunk,
                  " bytes make more than ", kMaxHops, " hops up to the demand of receivers ",
                  ranks_text(demand.receivers), "; give a larger chunk");
    KIMISYS_CHECK(demand.bytes() <= (kMaxTotalBytes - bytes) / width, kBad,
                  "the demands up to that of receivers ", ranks_text(demand.receivers),
                  " bring more than ", kMaxTotalBytes, " bytes in all; check their pieces");
    hops += parts * width;
    bytes += demand.bytes() * width;
  }
  return static_cast<std::size_t>(hops);
}

}  // namespace

std::int64_t Demand::bytes() const {
  std::int64_t sum = 0;
  for (const Piece& piece : pieces) sum += piece.bytes;
  return sum;
}

Route::Route(std::shared_ptr<const Cluster> cluster, std::vector<Demand> demands,
             RouteOptions options)
    : cluster_(std::move(cluster)), demands_(std::move(demands)), options_(options) {
  check_options(options_);
  for (const Demand& demand : demands_) check_demand(demand);
  servers_.reserve(check_size(demands_, options_.chunk));
  for (std::size_t d = 0; d < demands_.size(); ++d) {
    const std::int64_t bytes = demands_[d].bytes();
    const std::int64_t count = parts_of(bytes, options_.chunk);
    const std::size_t width = demands_[d].receivers.size();
    std::int64_t begin = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      // The first bytes % count parts get one byte more.
      const std::int64_t size = bytes / count + (i < bytes % count ? 1 : 0);
      parts_.push_back({static_cast<std::uint32_t>(d), begin, size, servers_.size()});
      servers_.resize(servers_.size() + width);
      begin += size;
    }
  }
  receivers_.reserve(servers_.size());
  for (const Part& part : parts_) {
    for (const std::int64_t rank : demands_[part.demand].receivers) {
      receivers_.push_back(cluster_->destination(rank));
    }
  }
  Router(*cluster_, demands_, options_, parts_, receivers_, servers_).run();
  count();
}

void Route::count() {
  egress_.assign(cluster_->nics().size(), 0);
  ingress_.assign(cluster_->nics().size(), 0);
  const std::vector<Endpoint>& endpoints = cluster_->endpoints();
  for (const Part& part : parts_) {
    for (std::size_t i = 0; i < demands_[part.demand].receivers.size(); ++i) {
      const std::size_t hop = part.first_hop + i;
      if (local(hop)) {
        local_bytes_ += part.bytes;
        continue;
      }
      remote_bytes_ += part.bytes;
      if (endpoints[server(hop)].destination) relayed_bytes_ += part.bytes;
      egress_[endpoints[server(hop)].nic] += part.bytes;
      ingress_[endpoints[receiver(hop)].nic] += part.bytes;
    }
  }
}

std::ostream& operator<<(std::ostream& stream, const Demand& demand) {
  return stream << "Demand(" << demand.bytes() << " bytes in " << demand.copies
                << " copies: owners " << ranks_text(demand.owners) << " -> receivers "
                << ranks_text(demand.receivers) << ")";
}

std::ostream& operator<<(std::ostream& stream, const Route& route) {
  const auto most = [](const std::vector<std::int64_t>& loads) {
    return loads.empty() ? 0 : *std::max_element(loads.begin(), loads.end());
  };
  return stream << "Route(" << route.demands().size() << " demands in " << route.parts().size()
                << " parts over " << route.cluster().nics().size()
                << " NICs: " << route.remote_bytes() << " remote bytes, of them "
                << route.relayed_bytes() << " by relay, " << route.local_bytes()
                << " local; a NIC sends at most " << most(route.egress())
                << " and receives at most " << most(route.ingress()) << ")";
}

}  // namespace kimisys::reshard
