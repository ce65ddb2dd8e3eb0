#include "rollout/ledger.h"

#include <bit>

namespace kimisys::rollout {

void Lengths::add(std::int64_t tokens_of_one) {
  const auto bucket = std::bit_width(static_cast<std::uint64_t>(tokens_of_one));
  ++count.at(static_cast<std::size_t>(bucket));
  ++trajectories;
  tokens += tokens_of_one;
}

}  // namespace kimisys::rollout
