// 128 bits that stand for a string of bytes: for telling versions apart, not against forgery.
#pragma once

#include <string>
#include <string_view>

namespace kimisys {

// 32 hexadecimal digits, the same on every machine.
std::string fingerprint(std::string_view bytes);

}  // namespace kimisys
