"""Layout x Layout -> Plan -> bytes in place.

A ``Layout`` says where each rank stores which region of which tensor. ``plan`` joins two layouts
into strided copies and proves that every destination byte is written exactly once. ``Plan.execute``
runs the copies on memory; ``Plan.bind`` checks the memory once, for many runs. Needs numpy alone.
"""

from kimisys._core.reshard import (
    Buffer,
    Copy,
    Demand,
    Execution,
    Fragment,
    Layout,
    Padding,
    Place,
    Plan,
    Proof,
    Region,
    Route,
    Simulation,
    Tensor,
    implementations,
    itemsize,
    plan,
    prove,
    route,
    route_demands,
)

__all__ = [
    "Buffer",
    "Copy",
    "Demand",
    "Execution",
    "Fragment",
    "Layout",
    "Padding",
    "Place",
    "Plan",
    "Proof",
    "Region",
    "Route",
    "Simulation",
    "Tensor",
    "implementations",
    "itemsize",
    "plan",
    "prove",
    "route",
    "route_demands",
]
