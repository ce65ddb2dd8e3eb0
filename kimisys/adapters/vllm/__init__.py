"""The engine's side: vLLM's layouts, its weight-transfer backend ``kimisys``, and an engine.

Importing this package loads no vLLM; its modules do when they are used.
"""
