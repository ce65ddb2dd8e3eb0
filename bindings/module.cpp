// Table of contents of kimisys._core: each primitive binds itself in its own file.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of kimisys. Use it through the packages of the primitives.";
  kimisys::bindings::bind_errors(module);
  kimisys::bindings::bind_reshard(module);
  kimisys::bindings::bind_quantize(module);
  kimisys::bindings::bind_matrix(module);
  kimisys::bindings::bind_broadcast(module);
  kimisys::bindings::bind_rollout(module);
}
