// The loops behind the scatter, each against the naive one.
#include <doctest/doctest.h>

#include <bit>
#include <random>

#include "broadcast/digest_stream.h"
#include "broadcast/scatter_boxes.h"
#include "broadcast/scatter_elements.h"
#include "reshard/sample.h"
#include "reshard/stream.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Region;
using reshard::Tensor;
using Bytes = std::vector<std::byte>;

Bytes random_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

constexpr std::array<DType, 4> kTypes = {DType::kUInt8, DType::kBFloat16, DType::kFloat32,
                                         DType::kInt64};

// A block, a target within it, and strides of the destination with gaps.
struct Case {
  Dims shape;
  Region block;
  Region box;
  std::vector<std::size_t> order;  // of the destination's dimensions, outermost first
};

const std::vector<Case> kCases = {
    {{}, {{}, {}}, {{}, {}}, {}},
    {{5000}, {{7}, {4900}}, {{7}, {4900}}, {0}},
    {{5000}, {{7}, {4900}}, {{1000}, {300}}, {0}},
    {{600, 700}, {{3, 100}, {512, 512}}, {{3, 100}, {512, 512}}, {0, 1}},
    {{600, 700}, {{3, 100}, {512, 512}}, {{10, 100}, {77, 512}}, {0, 1}},
    {{600, 700}, {{3, 100}, {512, 512}}, {{10, 333}, {400, 200}}, {0, 1}},
    {{600, 700}, {{3, 100}, {512, 512}}, {{10, 333}, {400, 200}}, {1, 0}},
    {{600, 700}, {{0, 0}, {370, 700}}, {{5, 0}, {300, 700}}, {0, 1}},
    {{600, 700}, {{0, 0}, {370, 700}}, {{5, 0}, {300, 700}}, {1, 0}},
    {{600, 700}, {{0, 0}, {370, 700}}, {{5, 3}, {1, 690}}, {0, 1}},
    {{600, 700}, {{0, 0}, {370, 700}}, {{5, 3}, {300, 1}}, {0, 1}},
    {{30, 40, 50}, {{0, 0, 0}, {30, 40, 50}}, {{3, 5, 7}, {20, 30, 40}}, {0, 1, 2}},
    {{30, 40, 50}, {{0, 0, 0}, {30, 40, 50}}, {{3, 0, 0}, {20, 40, 50}}, {0, 1, 2}},
    {{30, 40, 50}, {{0, 0, 0}, {30, 40, 50}}, {{0, 5, 0}, {30, 30, 50}}, {1, 2, 0}},
    {{30, 40, 50}, {{4, 0, 0}, {1, 40, 50}}, {{4, 5, 7}, {1, 30, 40}}, {2, 0, 1}},
    {{9, 8, 7, 60}, {{1, 1, 1, 5}, {7, 6, 5, 50}}, {{2, 1, 2, 9}, {5, 6, 2, 33}}, {0, 2, 1, 3}},
};

// The target's strides and offset; gap elements lie between the outermost rows.
Target target_of(const Case& it, std::int64_t item, std::int64_t gap, std::int64_t* nbytes) {
  Target target;
  target.box = it.box;
  target.strides = Dims(it.shape.size());
  std::int64_t stride = item;
  for (std::size_t i = it.order.size(); i-- > 0;) {
    if (i == 0) stride += gap * item;
    target.strides[it.order[i]] = stride;
    stride *= it.box.extent[it.order[i]];
  }
  target.offset = 3 * item;
  target.counter = 0x123456789abcdefU;
  *nbytes = target.offset + stride + gap * item * (it.order.empty() ? 0 : it.box.extent[0]);
  for (std::size_t d = 0; d < it.shape.size(); ++d) {
    *nbytes += (it.box.extent[d] - 1) * target.strides[d];
  }
  return target;
}

TEST_CASE("every kernel finds the elements that the naive one finds") {
  std::mt19937_64 random(1);
  for (const Case& it : kCases) {
    for (std::size_t width = 0; width < 4; ++width) {
      for (const double density : {0.001, 0.1, 1.0}) {
        const std::int64_t item = itemsize(kTypes[width]);
        const Tensor tensor{"t", kTypes[width], it.shape};
        const Block block{0, it.block};
        std::int64_t nbytes = 0;
        const Target target = target_of(it, item, static_cast<std::int64_t>(random() % 2), &nbytes);
        std::vector<std::uint32_t> positions;
        for (std::int64_t p = 0; p < it.block.elements(); ++p) {
          if (std::uniform_real_distribution<double>()(random) < density) {
            positions.push_back(static_cast<std::uint32_t>(p));
          }
        }
        const auto count = static_cast<std::size_t>(nbytes);
        const Bytes values = random_bytes(positions.size() * static_cast<std::size_t>(item) + 1, 2);
        const Bytes before = random_bytes(count, 3);
        const Changes changes{positions, values.data() + 1};  // of any alignment
        const ElementKernel& naive = element_kernels().back();
        const Walk plain = make_walk(tensor, block, target, naive.merged);
        const std::uint64_t sum = naive.measure[width](plain, changes, before.data());
        Bytes expected = before;
        const std::int64_t written = naive.write[width](plain, changes, expected.data());
        for (const ElementKernel& kernel : element_kernels()) {
          CAPTURE(kernel.name);
          const Walk walk = make_walk(tensor, block, target, kernel.merged);
          CHECK(kernel.measure[width](walk, changes, before.data()) == sum);
          Bytes bytes = before;
          CHECK(kernel.write[width](walk, changes, bytes.data()) == written);
          CHECK(bytes == expected);
        }
      }
    }
  }
}

TEST_CASE("every kernel copies and sums a box as the naive one does") {
  for (const Case& it : kCases) {
    for (std::size_t width = 0; width < 4; ++width) {
      const std::int64_t item = itemsize(kTypes[width]);
      const Tensor tensor{"t", kTypes[width], it.shape};
      std::int64_t nbytes = 0;
      const Target target = target_of(it, item, 1, &nbytes);
      const Dims strides = reshard::test::dense_strides(it.shape, item);
      const Bytes source = random_bytes(static_cast<std::size_t>(tensor.elements() * item) + 1, 4);
      const Bytes before = random_bytes(static_cast<std::size_t>(nbytes) + 1, 5);
      for (const BoxWork work : {BoxWork{true, true, false}, BoxWork{true, true, true},
                                 BoxWork{false, true, true}, BoxWork{true, false, false}}) {
        for (const std::size_t shift : {0U, 1U}) {  // addresses on an element, and beside
          Bytes expected = before;
          const Box plain = make_box(tensor, target, source.data() + shift, strides,
                                     expected.data() + shift, false);
          const std::uint64_t sum = run_box(plain, work, "naive");
          for (const ElementKernel& kernel : element_kernels()) {
            CAPTURE(kernel.name);
            Bytes bytes = before;
            const Box box = make_box(tensor, target, source.data() + shift, strides,
                                     bytes.data() + shift, kernel.merged);
            CHECK(run_box(box, work, kernel.name) == sum);
            reshard::finish_streaming();
            CHECK(bytes == expected);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kimisys::broadcast
