// kimisys._core.rollout.
#include <pybind11/pybind11.h>

#include "bindings.h"

namespace py = pybind11;

namespace kimisys::bindings {

void bind_rollout(py::module_& module) {
  py::module_ rollout = module.def_submodule("rollout", "The scheduler of rollouts.");
  bind_repetition(rollout);
}

}  // namespace kimisys::bindings
