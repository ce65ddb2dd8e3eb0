"""kimisys: the systems layer between a trainer and an inference engine that want the same weights.

Import the primitive you need (``kimisys.reshard``, ``kimisys.broadcast``); importing this package
alone loads nothing else.
"""

__version__ = "0.1.0"
