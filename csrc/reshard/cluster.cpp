#include "reshard/cluster.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"

namespace kimisys::reshard {

Cluster::Cluster(std::vector<Place> source, std::vector<Place> destination) {
  add(std::move(source), false, sources_);
  add(std::move(destination), true, destinations_);
  std::map<std::pair<std::int64_t, std::int64_t>, std::size_t> numbers;
  for (const Endpoint& endpoint : endpoints_) {
    numbers.try_emplace({endpoint.place.node, endpoint.place.nic}, 0);
  }
  for (auto& [key, number] : numbers) {
    number = nics_.size();
    nics_.push_back({key.first, key.second});
  }
  for (Endpoint& endpoint : endpoints_) {
    endpoint.nic = numbers.at({endpoint.place.node, endpoint.place.nic});
  }
}

void Cluster::add(std::vector<Place> places, bool destination, Index& index) {
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.rank < b.rank; });
  for (const Place& place : places) {
    const auto number = static_cast<std::uint32_t>(endpoints_.size());
    KIMISYS_CHECK(index.emplace(place.rank, number).second, ErrorCode::kLayout,
                  destination ? "destination" : "source", " rank ", place.rank,
                  " has two places; give each rank one");
    endpoints_.push_back({destination, place, 0});
  }
}

std::uint32_t Cluster::source(std::int64_t rank) const {
  const auto found = sources_.find(rank);
  KIMISYS_CHECK(found != sources_.end(), ErrorCode::kPlan, "a demand names source rank ", rank,
                " that has no place; give one place for each rank");
  return found->second;
}

std::uint32_t Cluster::destination(std::int64_t rank) const {
  const auto found = destinations_.find(rank);
  KIMISYS_CHECK(found != destinations_.end(), ErrorCode::kPlan, "a demand names destination rank ",
                rank, " that has no place; give one place for each rank");
  return found->second;
}

}  // namespace kimisys::reshard
