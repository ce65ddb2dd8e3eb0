#include "reshard/quantize.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <sstream>
#include <utility>

#include "base/error.h"
#include "base/thread_pool.h"
#include "reshard/implementation.h"
#include "reshard/memory.h"
#include "reshard/quantize_kernels.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kLayout;

// Source bytes of a unit: in a second-level cache together with what is made of them.
constexpr std::int64_t kUnitBytes = std::int64_t{256} << 10;

// Units that a thread takes in a row, so that it knows what comes next.
constexpr std::size_t kBatch = 4;

std::int64_t blocks_in(std::int64_t extent, std::int64_t block) {
  return (extent + block - 1) / block;
}

const Tensor& tensor_of(const Layout& layout, std::size_t fragment) {
  return layout.tensors()[layout.tensor_of(fragment)];
}

// For messages: whose, where, on which rank.
std::string name_of(const Fragment& fragment) {
  std::ostringstream text;
  text << "tensor '" << fragment.tensor << "', region " << fragment.region << " of rank "
       << fragment.rank;
  return text.str();
}

void check_block(BlockShape block) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 20;
  KIMISYS_CHECK(
      std::min(block.rows, block.columns) >= 1 && std::max(block.rows, block.columns) <= kLargest,
      kBad, "a block of ", block.rows, " x ", block.columns,
      " elements is impossible; give two sizes from 1 to ", kLargest,
      ", as config.json's weight_block_size");
}

void check_source(const Layout& layout, std::size_t index, BlockShape block) {
  const Fragment& fragment = layout.fragments()[index];
  const Tensor& tensor = tensor_of(layout, index);
  KIMISYS_CHECK(tensor.dtype == DType::kBFloat16 || tensor.dtype == DType::kFloat32, kBad,
                name_of(fragment), ", is ", dtype_name(tensor.dtype),
                "; only bfloat16 and float32 can be quantized: choose other tensors");
  check_whole_blocks(layout, index, block);
}

// One of the two fragments that are written: its dtype, its shape, and dense.
void check_written(const Layout& layout, std::size_t index, DType dtype, std::int64_t rows,
                   std::int64_t columns) {
  const Fragment& fragment = layout.fragments()[index];
  const std::int64_t item = itemsize(dtype);
  KIMISYS_CHECK(tensor_of(layout, index).dtype == dtype, kBad, name_of(fragment), ", is ",
                dtype_name(tensor_of(layout, index).dtype), " where the part needs ",
                dtype_name(dtype), "; take the layout that quantized() made");
  KIMISYS_CHECK((fragment.region.extent == Dims{rows, columns}), kBad, name_of(fragment),
                ", is not ", rows, " x ", columns,
                " as its source asks; take the layout that quantized() made");
  KIMISYS_CHECK((fragment.byte_strides == Dims{columns * item, item}), kBad, name_of(fragment),
                ", is not dense; take the layout that quantized() made");
}

std::size_t checked(const Layout& layout, std::size_t index) {
  KIMISYS_CHECK(index < layout.fragments().size(), kBad, "a part names fragment ", index,
                " of a layout that has ", layout.fragments().size());
  return index;
}

void add_units(std::size_t part, const Fragment& fragment, std::int64_t item, BlockShape block,
               std::vector<QuantizeUnit>& units) {
  const std::int64_t rows = fragment.region.extent[0];
  const std::int64_t columns = fragment.region.extent[1];
  const std::int64_t wide =
      std::max<std::int64_t>(1, kUnitBytes / (block.rows * item * block.columns));
  for (std::int64_t row = 0; row < rows; row += block.rows) {
    for (std::int64_t column = 0; column < columns; column += wide * block.columns) {
      units.push_back({part, row, column, std::min(block.rows, rows - row),
                       std::min(wide * block.columns, columns - column)});
    }
  }
}

const std::byte* source_of(const Fragment& fragment, const QuantizeUnit& unit,
                           const Memory& memory) {
  return memory.data + fragment.byte_offset + unit.row * fragment.byte_strides[0] +
         unit.column * fragment.byte_strides[1];
}

}  // namespace

void check_whole_blocks(const Layout& layout, std::size_t index, BlockShape block) {
  check_block(block);
  const Fragment& fragment = layout.fragments()[index];
  const Tensor& tensor = tensor_of(layout, index);
  KIMISYS_CHECK(tensor.shape.size() == 2, kBad, name_of(fragment), ", has ", tensor.shape.size(),
                " dimensions; only matrices have block scales: choose other tensors");
  if (fragment.region.empty()) return;
  const std::array<std::int64_t, 2> sizes = {block.rows, block.columns};
  for (std::size_t d = 0; d < 2; ++d) {
    const std::int64_t begin = fragment.region.offset[d];
    const std::int64_t end = begin + fragment.region.extent[d];
    KIMISYS_CHECK(begin % sizes[d] == 0 && (end % sizes[d] == 0 || end == tensor.shape[d]), kBad,
                  name_of(fragment), ", cuts a block of ", block.rows, " x ", block.columns,
                  " in dimension ", d,
                  ", whose one scale would belong to two fragments; shard this tensor in multiples "
                  "of the block, or leave it unquantized");
  }
}

std::vector<std::string> quantize_implementations() { return names_of(quantize_rows()); }

Quantizer::Quantizer(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> quantized,
                     std::vector<QuantizedPart> parts, BlockShape block)
    : source_(std::move(source)),
      quantized_(std::move(quantized)),
      parts_(std::move(parts)),
      block_(block) {
  check_block(block_);
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const QuantizedPart& part = parts_[i];
    check_source(*source_, checked(*source_, part.source), block_);
    const Fragment& from = source_->fragments()[part.source];
    const std::int64_t rows = from.region.extent[0];
    const std::int64_t columns = from.region.extent[1];
    check_written(*quantized_, checked(*quantized_, part.values), DType::kFloat8E4M3FN, rows,
                  columns);
    check_written(*quantized_, checked(*quantized_, part.scales), DType::kFloat32,
                  blocks_in(rows, block_.rows), blocks_in(columns, block_.columns));
    add_units(i, from, itemsize(tensor_of(*source_, part.source).dtype), block_, units_);
  }
}

BlockRow Quantizer::block_row(const QuantizeUnit& unit, const std::vector<Memory>& sources,
                              const std::vector<Memory>& destinations) const {
  const QuantizedPart& part = parts_[unit.part];
  const Fragment& from = source_->fragments()[part.source];
  const Fragment& values = quantized_->fragments()[part.values];
  const Fragment& scales = quantized_->fragments()[part.scales];
  BlockRow blocks;
  blocks.source = source_of(from, unit, sources[source_->buffer_of(part.source)]);
  blocks.row_stride = from.byte_strides[0];
  blocks.column_stride = from.byte_strides[1];
  blocks.dtype = tensor_of(*source_, part.source).dtype;
  blocks.rows = unit.rows;
  blocks.columns = unit.columns;
  blocks.block_columns = block_.columns;
  blocks.value_stride = values.byte_strides[0];
  blocks.values = destinations[quantized_->buffer_of(part.values)].data + values.byte_offset +
                  unit.row * values.byte_strides[0] + unit.column;
  blocks.scales = destinations[quantized_->buffer_of(part.scales)].data + scales.byte_offset +
                  unit.row / block_.rows * scales.byte_strides[0] +
                  unit.column / block_.columns * scales.byte_strides[1];
  return blocks;
}

void Quantizer::fill(const Memories& sources, const Memories& destinations,
                     const ExecuteOptions& options) const {
  const QuantizeRows* rows =
      choose_implementation(quantize_rows(), options.implementation, "quantize");
  std::vector<bool> is_read(source_->buffers().size(), false);
  std::vector<bool> is_written(quantized_->buffers().size(), false);
  for (const QuantizedPart& part : parts_) {
    is_read[source_->buffer_of(part.source)] = true;
    is_written[quantized_->buffer_of(part.values)] = true;
    is_written[quantized_->buffer_of(part.scales)] = true;
  }
  const auto from = needed_memory(*source_, sources, is_read, Side::kSource);
  const auto to = needed_memory(*quantized_, destinations, is_written, Side::kDestination);
  check_no_overlap(*source_, from, *quantized_, to);

  // Units before the first bad one are always run, so that the same one is named every time.
  std::atomic<std::size_t> bad = units_.size();
  const auto run = [&](std::size_t index, bool has_next) {
    if (index > bad.load(std::memory_order_relaxed)) return;
    BlockRow blocks = block_row(units_[index], from, to);
    if (has_next) {
      const BlockRow next = block_row(units_[index + 1], from, to);
      if (next.column_stride == itemsize(next.dtype)) {
        blocks.next = {next.source, next.row_stride, next.rows, next.columns * next.column_stride};
      }
    }
    if (rows == nullptr ? quantize_blocks_naive(blocks) : quantize_blocks(blocks, *rows)) return;
    std::size_t seen = bad.load();
    while (index < seen && !bad.compare_exchange_weak(seen, index)) {
    }
  };
  const std::size_t batches = (units_.size() + kBatch - 1) / kBatch;
  parallel_for(batches, options.threads, [&](std::size_t batch) {
    const std::size_t end = std::min(units_.size(), (batch + 1) * kBatch);
    for (std::size_t index = batch * kBatch; index < end; ++index) run(index, index + 1 < end);
  });
  if (bad.load() < units_.size()) fail_at(units_[bad.load()], from);
}

void Quantizer::fail_at(const QuantizeUnit& unit, const std::vector<Memory>& sources) const {
  const std::size_t index = parts_[unit.part].source;
  const Fragment& fragment = source_->fragments()[index];
  const DType dtype = tensor_of(*source_, index).dtype;
  const std::byte* corner = source_of(fragment, unit, sources[source_->buffer_of(index)]);
  for (std::int64_t row = 0; row < unit.rows; ++row) {
    for (std::int64_t column = 0; column < unit.columns; ++column) {
      const float value = float_at(
          corner + row * fragment.byte_strides[0] + column * fragment.byte_strides[1], dtype);
      if (std::isfinite(value)) continue;
      const Dims place = {fragment.region.offset[0] + unit.row + row,
                          fragment.region.offset[1] + unit.column + column};
      fail(ErrorCode::kNotFinite, name_of(fragment), ", is ", value, " at element ",
           to_string(place),
           ", which no block scale can hold; nothing of this fill may be moved: "
           "mend the weights and fill again");
    }
  }
  fail(ErrorCode::kNotFinite, name_of(fragment),
       ", changed while it was quantized; nothing of this fill may be moved: fill again while "
       "nobody writes the weights");
}

}  // namespace kimisys::reshard
