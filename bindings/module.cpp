// Table of contents of kimisys._core: each primitive binds itself in its own file.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of kimisys. Use it through kimisys.reshard and kimisys.broadcast.";
  kimisys::bindings::bind_errors(module);
  kimisys::bindings::bind_reshard(module);
  kimisys::bindings::bind_quantize(module);
  kimisys::bindings::bind_matrix(module);
  kimisys::bindings::bind_broadcast(module);
}
