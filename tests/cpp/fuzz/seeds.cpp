#include <memory>
#include <utility>

#include "fuzz/forms_fuzz.h"
#include "reshard/sample.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard::test {

std::vector<std::string> seeds() {
  std::vector<std::string> all;
  // Everything that a layout may have; whoever is unlucky may plan nothing but the empty layout.
  Random random(7);
  for (int i = 0; i < 4; ++i) {
    const std::vector<Tensor> tensors = {{"a", DType::kFloat32, random.shape()},
                                         {"b", DType::kInt8, {3, 5}}};
    const auto source = share(random.layout(tensors, 2, true));
    const auto destination = share(random.layout(tensors, 2, false));
    const Plan plan = make_plan(source, destination);
    all.push_back(source->to_bytes());
    all.push_back(plan.to_bytes());
    all.push_back(plan.of_source(source->ranks().front()).to_bytes());
  }
  const auto side = [](std::size_t dim, std::int64_t ranks) {
    std::vector<std::int64_t> numbers;
    for (std::int64_t rank = 0; rank < ranks; ++rank) numbers.push_back(rank + 1);
    const auto layer = share(sharded("layers.{}.w", DType::kBFloat16, {8, 8}, dim, ranks));
    const auto outer = share(sharded("embedding", DType::kBFloat16, {8, 8}, dim, ranks));
    return std::make_shared<const SymbolicLayout>(
        std::vector<LayoutBlock>{{layer, {{"0", numbers, "0"}, {"1", numbers, "one"}}},
                                 {outer, {{"", numbers, ""}}}},
        std::vector<Place>{{1, 0, 0}, {2, 1, 1, 1}});
  };
  const SymbolicPlan plan(side(0, 4), side(1, 2));
  all.push_back(plan.source().to_bytes());
  all.push_back(plan.to_bytes());
  return all;
}

}  // namespace kimisys::reshard::test
