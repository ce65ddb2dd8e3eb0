// The parts of the compact forms, to be put together by the types that have one.
#pragma once

#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "reshard/layout.h"
#include "reshard/plan.h"
#include "reshard/symbolic.h"

namespace kimisys::reshard {

// The first bytes of each form: what it is, and the version.
inline constexpr std::string_view kLayoutMagic = "kimisys.L1";
inline constexpr std::string_view kSymbolicLayoutMagic = "kimisys.S1";
inline constexpr std::string_view kPlanMagic = "kimisys.P1";
inline constexpr std::string_view kSymbolicPlanMagic = "kimisys.Q1";

void write_layout(const Layout& layout, ByteWriter& out);
Layout read_layout(ByteReader& in);

void write_symbolic(const SymbolicLayout& layout, ByteWriter& out);
SymbolicLayout read_symbolic(ByteReader& in);

// Steps between fragments of these two layouts; not yet proven when read.
void write_steps(const Layout& source, const Layout& destination, const std::vector<Step>& steps,
                 ByteWriter& out);
std::vector<Step> read_steps(const Layout& source, const Layout& destination, ByteReader& in);

}  // namespace kimisys::reshard
