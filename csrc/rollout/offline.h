// The best schedule of whole iterations that is found when all lengths are known: what a scheduler
// that sees lengths only as they happen is compared with.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rollout/bounds.h"
#include "rollout/simulated_engine.h"
#include "rollout/simulator.h"

namespace kimisys::rollout {

// How an engine gets its list. kAtOnce: all from the start; it admits what fits and preempts when
// its cache overflows. kHeld: each, in order, when the cache will hold it and all that run until
// they end; nothing is preempted.
enum class Admit : std::uint8_t { kAtOnce, kHeld };

// When an engine ends such a list, of indices into `outputs`. By the engine model of simulator.h,
// exactly.
Ticks list_time(const EngineModel& model, std::span<const Output> outputs,
                std::span<const std::uint32_t> list, Admit admit);

struct OfflineSchedule {                          // of one iteration
  double seconds = 0;                             // its makespan
  std::vector<std::vector<std::uint32_t>> lists;  // by engine: its trajectories, in start order
  std::vector<Admit> admit;                       // by engine
};

struct Offline {
  std::vector<OfflineSchedule> iterations;
  double seconds = 0;            // as Bounds::seconds, with these schedules' makespans
  std::int64_t evaluations = 0;  // engine lists that were timed, over all iterations
};

// Local search over which engine gets which trajectory, in which order, and how it admits; no
// trajectory moves once it has begun. From the better of two starts (longest first to the least
// loaded; the longest together), it moves, swaps and reorders what the last engine has, as long as
// that lowers the makespan, and shakes the best found when nothing does for long. `evaluations`:
// engine lists to time in each iteration, after the starts; a change under way is ended. Equal
// arguments give equal schedules. Raises as bounds(), and for a negative budget. Outages are not
// looked at.
Offline offline(const Simulation& simulation, const Lots& lots, std::int64_t evaluations,
                std::uint64_t seed = 0);

}  // namespace kimisys::rollout
