// Transposing what will be packed; part of kimisys._core.reshard.
#include "reshard/matrix.h"

#include "base/error.h"
#include "bindings.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

// Rows and columns of a dense matrix of two-byte elements.
struct Matrix {
  py::buffer_info info;
  std::size_t rows = 0;
  std::size_t columns = 0;
};

Matrix matrix_of(const py::buffer& buffer, bool writable, const char* side) {
  Matrix found{buffer.request(writable)};
  const py::buffer_info& info = found.info;
  const bool fits = info.ndim == 2 && info.itemsize == 2 && info.strides[1] == 2 &&
                    info.strides[0] == 2 * info.shape[1];
  KIMISYS_CHECK(fits || info.size == 0, ErrorCode::kBufferMismatch, "the ", side,
                " is not a dense matrix of two-byte elements; give a C-contiguous view of one");
  found.rows = static_cast<std::size_t>(info.shape[0]);
  found.columns = static_cast<std::size_t>(info.shape[1]);
  return found;
}

void transpose(const py::buffer& source, const py::buffer& destination, std::int64_t threads) {
  KIMISYS_CHECK(threads >= 0, ErrorCode::kLayout, "threads is ", threads,
                "; give a positive number, or 0 for all that the process may use");
  const Matrix from = matrix_of(source, false, "source");
  const Matrix to = matrix_of(destination, true, "destination");
  KIMISYS_CHECK(from.rows == to.columns && from.columns == to.rows, ErrorCode::kBufferMismatch,
                "the source has ", from.rows, " x ", from.columns, " elements, the destination ",
                to.rows, " x ", to.columns, "; give a destination of the transposed shape");
  const auto* first = static_cast<const std::byte*>(from.info.ptr);
  const auto* second = static_cast<const std::byte*>(to.info.ptr);
  const std::size_t nbytes = 2 * from.rows * from.columns;
  KIMISYS_CHECK(nbytes == 0 || first + nbytes <= second || second + nbytes <= first,
                ErrorCode::kBufferMismatch,
                "source and destination overlap; give the destination memory of its own");
  const py::gil_scoped_release release;
  reshard::transpose_matrix(static_cast<const std::uint16_t*>(from.info.ptr),
                            static_cast<std::uint16_t*>(to.info.ptr), from.rows, from.columns,
                            static_cast<std::size_t>(threads));
}

}  // namespace

void bind_matrix(py::module_& module) {
  py::module_ reshard = module.attr("reshard");
  reshard.def(
      "transpose", &transpose, py::arg("source"), py::arg("destination"), py::arg("threads") = 0,
      "Writes a dense matrix of two-byte elements transposed: destination[j, i] =\n"
      "source[i, j]. Buffers of shape [rows, columns] and [columns, rows]; threads: 0 means\n"
      "all that the process may use. Releases the GIL. BufferMismatchError, LayoutError.");
}

}  // namespace kimisys::bindings
