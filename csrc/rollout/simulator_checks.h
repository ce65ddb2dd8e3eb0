// What a simulation's numbers must be for it to mean something.
#pragma once

#include "rollout/simulator.h"

namespace kimisys::rollout {

void check(const EngineModel& model, std::size_t engine);  // raises SchedulerError
void check(const Simulation& simulation);                  // raises SchedulerError; its engines too
void check(const Simulation& simulation, const Lots& lots);  // raises SchedulerError; both

}  // namespace kimisys::rollout
