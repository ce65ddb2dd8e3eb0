// kimisys::Error becomes the Python exception class of its code.
#include <pybind11/gil_safe_call_once.h>

#include <array>
#include <utility>

#include "base/error.h"
#include "bindings.h"

namespace py = pybind11;

namespace kimisys::bindings {
namespace {

struct Class {
  ErrorCode code;
  const char* name;
  const char* doc;
};

constexpr std::array<Class, 8> kClasses = {{
    {ErrorCode::kLayout, "LayoutError", "A bad layout, region or shape, or its text form."},
    {ErrorCode::kPlan, "PlanError", "A plan is impossible, or its proof failed."},
    {ErrorCode::kBufferMismatch, "BufferMismatchError",
     "A missing, wrong-sized, read-only or overlapping buffer."},
    {ErrorCode::kSnapshot, "SnapshotError",
     "Shared memory, a file descriptor or a socket failed, or a read was torn."},
    {ErrorCode::kVersion, "VersionError", "The version is not published, or does not increase."},
    {ErrorCode::kDigest, "DigestError", "The digests of the two sides differ."},
    {ErrorCode::kNotFinite, "NotFiniteError", "A weight is NaN or infinite where it must not be."},
    {ErrorCode::kScheduler, "SchedulerError",
     "A rollout configuration, event or trace that makes no sense."},
}};

using Classes = std::array<PyObject*, kClasses.size()>;
PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<Classes> g_classes;

PyObject* make_class(const char* name, const char* doc, PyObject* base) {
  const std::string qualified = std::string("kimisys.errors.") + name;
  PyObject* made = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, base, nullptr);
  if (made == nullptr) throw py::error_already_set();
  return made;
}

PyObject* class_of(ErrorCode code) {
  const Classes& classes = g_classes.get_stored();
  for (std::size_t i = 0; i < kClasses.size(); ++i) {
    if (kClasses[i].code == code) return classes[i];
  }
  return PyExc_RuntimeError;
}

}  // namespace

void bind_errors(py::module_& module) {
  PyObject* base =
      make_class("KimisysError", "The base of all errors of kimisys.", PyExc_Exception);
  module.attr("KimisysError") = py::reinterpret_borrow<py::object>(base);
  const Classes& classes = g_classes
                               .call_once_and_store_result([base] {
                                 Classes made = {};
                                 for (std::size_t i = 0; i < kClasses.size(); ++i) {
                                   made[i] = make_class(kClasses[i].name, kClasses[i].doc, base);
                                 }
                                 return made;
                               })
                               .get_stored();
  for (std::size_t i = 0; i < kClasses.size(); ++i) {
    module.attr(kClasses[i].name) = py::reinterpret_borrow<py::object>(classes[i]);
  }
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      PyErr_SetString(class_of(error.code()), error.what());
    }
  });
  module.def(
      "raise_error",
      [](int code, const std::string& message) {
        throw Error(static_cast<ErrorCode>(code), message);
      },
      py::arg("code"), py::arg("message"),
      "Throws the C++ error with this ErrorCode number. For the test of the mapping.");
}

}  // namespace kimisys::bindings
