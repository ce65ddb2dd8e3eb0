#include "reshard/execute.h"

#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "reshard/blocks.h"
#include "reshard/kernels.h"

namespace kimisys::reshard {
namespace {

constexpr std::string_view kNaive = "naive";

// The rows of the implementation asked for; null for the naive one.
const RowSet* choose(const std::string& asked) {
  std::string name = asked;
  if (name.empty()) {
    const char* forced = std::getenv("KIMISYS_RESHARD_IMPLEMENTATION");
    if (forced != nullptr) name = forced;
  }
  if (name.empty()) return &row_sets().front();
  if (name == kNaive) return nullptr;
  for (const RowSet& known : row_sets()) {
    if (known.name == name) return &known;
  }
  std::string list;
  for (const std::string& known : implementations()) {
    list.append(list.empty() ? "" : ", ").append(known);
  }
  fail(ErrorCode::kLayout, "unknown reshard implementation '", name,
       "' (argument or KIMISYS_RESHARD_IMPLEMENTATION); this machine has ", list);
}

}  // namespace

std::vector<std::string> implementations() {
  std::vector<std::string> names;
  for (const RowSet& set : row_sets()) names.emplace_back(set.name);
  names.emplace_back(kNaive);
  return names;
}

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
  made->rows = choose(options.implementation);
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
