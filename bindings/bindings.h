// One function per primitive; module.cpp calls them in order.
#pragma once

#include <pybind11/pybind11.h>

namespace kimisys::bindings {

void bind_errors(pybind11::module_& module);
void bind_reshard(pybind11::module_& module);
void bind_symbolic(pybind11::module_& reshard);  // called by bind_reshard
void bind_table(pybind11::module_& module);
void bind_route(pybind11::module_& reshard);  // called by bind_reshard
void bind_broadcast(pybind11::module_& module);
void bind_scatter(pybind11::module_& broadcast);   // called by bind_broadcast
void bind_snapshot(pybind11::module_& broadcast);  // called by bind_broadcast
void bind_publish(pybind11::module_& broadcast);   // called by bind_broadcast
void bind_delta(pybind11::module_& broadcast);     // called by bind_broadcast
void bind_encode(pybind11::module_& broadcast);    // called by bind_broadcast
void bind_quantize(pybind11::module_& module);
void bind_rollout(pybind11::module_& module);
void bind_repetition(pybind11::module_& rollout);  // called by bind_rollout
void bind_simulate(pybind11::module_& rollout);    // called by bind_rollout
void bind_matrix(pybind11::module_& module);

}  // namespace kimisys::bindings
