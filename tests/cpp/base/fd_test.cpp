#include "base/fd.h"

#include <doctest/doctest.h>
#include <fcntl.h>

#include <utility>
#include <vector>

namespace kimisys {
namespace {

std::vector<int> g_released;
void note(int value) { g_released.push_back(value); }
using Noted = Handle<int, -1, note>;

TEST_CASE("a handle releases once, whoever holds it last") {
  g_released.clear();
  {
    Noted first(1);
    Noted second(std::move(first));
    CHECK_FALSE(first);  // NOLINT: a moved-from handle owns nothing
    CHECK(second.get() == 1);
    Noted third(3);
    third = std::move(second);
    CHECK(g_released == std::vector<int>{3});
    Noted& same = third;
    third = std::move(same);
    CHECK(third.get() == 1);
    third.reset();
    third.reset();
    Noted none;
  }
  CHECK(g_released == std::vector<int>{3, 1});
}

TEST_CASE("a file descriptor is closed") {
  int number = -1;
  {
    const FileDescriptor file(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    REQUIRE(file);
    number = file.get();
  }
  CHECK(::fcntl(number, F_GETFD) == -1);
}

}  // namespace
}  // namespace kimisys
