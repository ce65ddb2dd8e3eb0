// What the fuzzers ask of the compact forms, and the small values that they begin with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// libFuzzer's entry: reads the bytes as each form. They are refused with a typed error, or the
// value writes bytes that read back to the same bytes; anything else aborts.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace kimisys::reshard::test {

// The forms of small layouts and plans, one for each thing that a form may have.
std::vector<std::string> seeds();

}  // namespace kimisys::reshard::test
