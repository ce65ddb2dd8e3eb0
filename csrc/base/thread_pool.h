// A persistent pool of worker threads, shared by the whole process.
//
// The calling thread always takes part in the work, so a loop makes progress even when every worker
// is busy with another caller's loop, and after a fork, where the child has no workers until it
// asks.
#pragma once

#include <cstddef>
#include <functional>

namespace kimisys {

// As many as one loop may run on, the calling thread included; who asks for more gets these.
inline constexpr std::size_t kMaxThreads = 257;

// Threads of the machine that this process may run on; at least 1.
std::size_t hardware_threads();

// Calls body(i) once for each i in [0, count), on at most `threads` threads including the caller
// (0 means hardware_threads()). Returns when all calls have ended. If a body throws, calls not yet
// begun are dropped and the first exception is rethrown here, on the calling thread.
void parallel_for(std::size_t count, std::size_t threads,
                  const std::function<void(std::size_t)>& body);

}  // namespace kimisys
