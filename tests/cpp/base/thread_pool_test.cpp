#include "base/thread_pool.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

namespace kimisys {

TEST_CASE("each index is visited once, whatever the number of threads") {
  for (const std::size_t threads : {0, 1, 2, 3, 9, 1000}) {
    for (const std::size_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> visits(count);
      parallel_for(count, threads, [&](std::size_t i) { ++visits[i]; });
      for (const auto& visit : visits) CHECK_EQ(visit.load(), 1);
    }
  }
}

TEST_CASE("the first exception reaches the caller, and the pool works on") {
  for (const std::size_t threads : {1, 4}) {
    CHECK_THROWS_AS(parallel_for(100, threads,
                                 [](std::size_t i) {
                                   if (i == 5) throw std::runtime_error("five");
                                 }),
                    std::runtime_error);
    std::atomic<int> sum = 0;
    parallel_for(10, threads, [&](std::size_t i) { sum += static_cast<int>(i); });
    CHECK(sum == 45);
  }
}

TEST_CASE("after an exception the rest is dropped") {
  constexpr std::size_t kCount = std::size_t{1} << 22;
  std::atomic<bool> thrown = false;
  std::atomic<std::size_t> visited = 0;
  const auto body = [&](std::size_t i) {
    ++visited;
    if (i == 0) {
      while (visited < 2) std::this_thread::yield();  // another thread has come
      thrown = true;
      throw std::runtime_error("first");
    }
    while (!thrown) std::this_thread::yield();
  };
  CHECK_THROWS_AS(parallel_for(kCount, 3, body), std::runtime_error);
  CHECK(visited < kCount);
}

TEST_CASE("loops inside loops and loops from several threads end") {
  std::atomic<int> sum = 0;
  const auto nested = [&] {
    parallel_for(4, 4, [&](std::size_t) { parallel_for(50, 4, [&](std::size_t) { ++sum; }); });
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(nested);
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 4 * 4 * 50);
}

TEST_CASE("a forked child has its own pool") {
  parallel_for(4, 4, [](std::size_t) {});
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::atomic<int> sum = 0;
    parallel_for(100, 4, [&](std::size_t) { ++sum; });
    _exit(sum == 100 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

}  // namespace kimisys
