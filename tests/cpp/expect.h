// Checks that an expression throws kimisys::Error with this code and all these words in its
// message.
#pragma once

#include <doctest/doctest.h>

#include <functional>
#include <initializer_list>
#include <string>

#include "base/error.h"

namespace kimisys::test {

inline void expect_error(ErrorCode code, std::initializer_list<const char*> words,
                         const std::function<void()>& action) {
  std::string message = "nothing was thrown";
  try {
    action();
  } catch (const Error& error) {
    message = error.what();
    CHECK(error.code() == code);
  }
  for (const char* word : words) {
    INFO("message: " << message);
    CHECK(message.find(word) != std::string::npos);
  }
}

}  // namespace kimisys::test
