#include "rollout/scheduler.h"

#include <utility>

#include "rollout/machine.h"

namespace kimisys::rollout {

Scheduler::Scheduler(const Config& config) {
  check(config);
  machine_ = std::make_unique<Machine>(config);
}
Scheduler::~Scheduler() = default;
Scheduler::Scheduler(Scheduler&&) noexcept = default;
Scheduler& Scheduler::operator=(Scheduler&&) noexcept = default;

void Scheduler::handle(const Event& event, std::vector<Action>& actions) {
  machine_->handle(event, actions);
}

void Scheduler::handle(std::span<const Event> events, std::vector<Action>& actions,
                       std::size_t& taken) {
  taken = 0;
  for (const Event& event : events) {
    machine_->handle(event, actions);
    ++taken;
  }
}

std::int64_t Scheduler::next_deadline() const {
  if (machine_->unsettled) return machine_->state.now;
  return machine_->deadlines.next(machine_->state);
}

std::vector<Blocker> Scheduler::blockers() const { return machine_->blockers(); }
Counts Scheduler::counts() const { return machine_->counts(); }
const Ledger& Scheduler::ledger() const { return machine_->ledger; }
const Config& Scheduler::config() const { return machine_->state.config; }
std::uint64_t Scheduler::digest() const { return machine_->digest; }

void Scheduler::reveal(std::function<std::int64_t(GroupId, std::uint32_t)> truth) {
  machine_->predictor.reveal(std::move(truth));
}

void Scheduler::audit() const { machine_->audit(); }

}  // namespace kimisys::rollout
