#include "reshard/execute.h"

#include <utility>

#include "reshard/blocks.h"
#include "reshard/implementation.h"
#include "reshard/kernels.h"

namespace kimisys::reshard {
std::vector<std::string> implementations() { return names_of(row_sets()); }

struct Execution::Prepared {
  const RowSet* rows;  // null: the naive implementation
  Blocks blocks;
  std::optional<Work> work;
};

Execution::~Execution() = default;
Execution::Execution(Execution&&) noexcept = default;

Execution::Execution(const Plan& plan, const Memories& sources, const Memories& destinations,
                     const ExecuteOptions& options) {
  auto made = std::make_unique<Prepared>();
  made->rows = choose_implementation(row_sets(), options.implementation, "reshard");
  made->blocks = bind_blocks(plan, sources, destinations);
  if (made->rows != nullptr) {
    auto& [copies, blanks] = made->blocks;
    made->work.emplace(std::move(copies), std::move(blanks), options.threads);
  }
  prepared_ = std::move(made);
}

void Execution::run() const {
  if (prepared_->work) return prepared_->work->run(*prepared_->rows);
  execute_naive(prepared_->blocks.copies, prepared_->blocks.blanks);
}

void execute(const Plan& plan, const Memories& sources, const Memories& destinations,
             const ExecuteOptions& options) {
  Execution(plan, sources, destinations, options).run();
}

}  // namespace kimisys::reshard
