"""Snapshots read from other hosts by Mooncake's transfer engine.

engine = Engine("10.0.0.1")                      # on the trainer's host
with Export(publisher, engine, folder / "rank0.card"): ...

engine = Engine("10.0.0.2")                      # on the engine's host, which has the cards
peers = connect(cards, engine)                   # from here on as with shared memory
"""

from kimisys.adapters.mooncake.engine import Engine
from kimisys.adapters.mooncake.export import Export
from kimisys.adapters.mooncake.memory import MooncakeMemory, connect

__all__ = ["Engine", "Export", "MooncakeMemory", "connect"]
