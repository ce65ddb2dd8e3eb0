// How the types print: used by error messages and by Python's repr.
#include <algorithm>
#include <ostream>

#include "reshard/layout.h"
#include "reshard/plan.h"

namespace kimisys::reshard {
namespace {

// "begin:end", also for numbers that no layout would accept.
std::string range_text(std::int64_t begin, std::int64_t length) {
  std::int64_t end = 0;
  const bool fits = !__builtin_add_overflow(begin, length, &end);
  return std::to_string(begin) + ":" + (fits ? std::to_string(end) : "beyond 2^63");
}

}  // namespace

std::string to_string(const Dims& dims) {
  std::string text = "(";
  for (std::size_t d = 0; d < dims.size(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(dims[d]);
  }
  return text + (dims.size() == 1 ? ",)" : ")");
}

std::string ranks_text(const std::vector<std::int64_t>& ranks) {
  constexpr std::size_t kShown = 8;
  std::string text = "[";
  for (std::size_t i = 0; i < std::min(ranks.size(), kShown); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(ranks[i]);
  }
  if (ranks.size() > kShown) text += ", ... " + std::to_string(ranks.size()) + " ranks";
  return text + "]";
}

std::ostream& operator<<(std::ostream& stream, const Region& region) {
  stream << "[";
  for (std::size_t d = 0; d < std::min(region.offset.size(), region.extent.size()); ++d) {
    if (d > 0) stream << ", ";
    stream << range_text(region.offset[d], region.extent[d]);
  }
  return stream << "]";
}

std::ostream& operator<<(std::ostream& stream, const Tensor& tensor) {
  return stream << "Tensor('" << tensor.name << "', " << dtype_name(tensor.dtype) << ", "
                << to_string(tensor.shape) << ")";
}

std::ostream& operator<<(std::ostream& stream, const Buffer& buffer) {
  return stream << "Buffer(rank " << buffer.rank << ", '" << buffer.name << "', " << buffer.nbytes
                << " bytes)";
}

std::ostream& operator<<(std::ostream& stream, const Fragment& fragment) {
  return stream << "Fragment('" << fragment.tensor << "' " << fragment.region << " at rank "
                << fragment.rank << " '" << fragment.buffer << "' + " << fragment.byte_offset
                << ", byte strides " << to_string(fragment.byte_strides) << ")";
}

std::ostream& operator<<(std::ostream& stream, const Padding& padding) {
  return stream << "Padding(rank " << padding.rank << " '" << padding.buffer << "' ["
                << range_text(padding.byte_offset, padding.nbytes) << "])";
}

std::ostream& operator<<(std::ostream& stream, const Place& place) {
  return stream << "Place(rank " << place.rank << ", node " << place.node << ", device "
                << place.device << ", nic " << place.nic << ")";
}

std::ostream& operator<<(std::ostream& stream, const Layout& layout) {
  std::uint64_t bytes = 0;
  for (const Buffer& buffer : layout.buffers()) bytes += static_cast<std::uint64_t>(buffer.nbytes);
  return stream << "Layout(" << layout.tensors().size() << " tensors, " << layout.fragments().size()
                << " fragments, " << layout.padding().size() << " paddings in "
                << layout.buffers().size() << " buffers, " << bytes << " bytes on ranks "
                << ranks_text(layout.ranks()) << ")";
}

std::ostream& operator<<(std::ostream& stream, const Copy& copy) {
  return stream << "Copy('" << copy.tensor << "' " << copy.region << ": rank " << copy.source_rank
                << " '" << copy.source_buffer << "' + " << copy.source_offset << " "
                << dtype_name(copy.source_dtype) << " -> rank " << copy.destination_rank << " '"
                << copy.destination_buffer << "' + " << copy.destination_offset << " "
                << dtype_name(copy.destination_dtype) << ")";
}

std::ostream& operator<<(std::ostream& stream, const Proof& proof) {
  return stream << "Proof(" << proof.destination_bytes
                << " destination bytes written once: " << proof.copied_bytes << " by "
                << proof.copies << " copies, " << proof.padding_bytes << " as padding)";
}

std::ostream& operator<<(std::ostream& stream, const Plan& plan) {
  stream << "Plan(" << plan.steps().size() << " copies, " << plan.nbytes() << " bytes, ranks "
         << ranks_text(plan.source().ranks()) << " -> ranks "
         << ranks_text(plan.destination().ranks());
  if (plan.share_of()) stream << ", share of source rank " << *plan.share_of();
  return stream << ")";
}

}  // namespace kimisys::reshard
