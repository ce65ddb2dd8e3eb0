// The choice of an implementation by name. A list of them is a span of structs with a `name`, those
// of this machine, fastest first; "naive" stands beside them.
#pragma once

#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace kimisys::reshard {

inline constexpr std::string_view kNaive = "naive";

template <typename Set>
std::vector<std::string> names_of(std::span<const Set> sets) {
  std::vector<std::string> names;
  for (const Set& set : sets) names.emplace_back(set.name);
  names.emplace_back(kNaive);
  return names;
}

// The one that is asked for, or else KIMISYS_RESHARD_IMPLEMENTATION, or else the first; null for
// the naive one. Raises LayoutError for another name; `what` is a word for the message.
template <typename Set>
const Set* choose_implementation(std::span<const Set> sets, const std::string& asked,
                                 std::string_view what) {
  std::string name = asked;
  if (name.empty()) {
    const char* forced = std::getenv("KIMISYS_RESHARD_IMPLEMENTATION");
    if (forced != nullptr) name = forced;
  }
  if (name.empty()) return &sets.front();
  if (name == kNaive) return nullptr;
  for (const Set& set : sets) {
    if (set.name == name) return &set;
  }
  std::string list;
  for (const std::string& known : names_of(sets)) {
    list.append(list.empty() ? "" : ", ").append(known);
  }
  fail(ErrorCode::kLayout, "unknown ", what, " implementation '", name,
       "' (argument or KIMISYS_RESHARD_IMPLEMENTATION); this machine has ", list);
}

}  // namespace kimisys::reshard
