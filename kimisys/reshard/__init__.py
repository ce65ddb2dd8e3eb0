"""Layout x Layout -> Plan -> bytes in place.

A ``Layout`` says where each rank stores which region of which tensor. ``plan`` joins two layouts
into strided copies and proves that every destination byte is written exactly once. ``Plan.execute``
runs the copies on memory; ``Plan.bind`` checks the memory once, for many runs. A ``SymbolicLayout``
names the layers of a model that repeat, and ``symbolic_plan`` plans and proves them once. Needs
numpy alone.
"""

from kimisys._core.reshard import (
    Block,
    Buffer,
    Copy,
    Demand,
    Execution,
    Fragment,
    Instance,
    Layout,
    Padding,
    Place,
    Plan,
    Proof,
    Region,
    Route,
    Simulation,
    SymbolicLayout,
    SymbolicPlan,
    Tensor,
    implementations,
    itemsize,
    plan,
    prove,
    route,
    route_demands,
    symbolic_plan,
    transpose,
)

__all__ = [
    "Block",
    "Buffer",
    "Copy",
    "Demand",
    "Execution",
    "Fragment",
    "Instance",
    "Layout",
    "Padding",
    "Place",
    "Plan",
    "Proof",
    "Region",
    "Route",
    "Simulation",
    "SymbolicLayout",
    "SymbolicPlan",
    "Tensor",
    "implementations",
    "itemsize",
    "plan",
    "prove",
    "route",
    "route_demands",
    "symbolic_plan",
    "transpose",
]
