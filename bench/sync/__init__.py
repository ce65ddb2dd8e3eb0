"""Weights from real Megatron ranks into a real vLLM engine, and the usual way beside it.

A part of `python -m bench broadcast`: `cases.py` says what is timed, `rank.py` and `engine.py` are
the processes, `world.py` starts and drives them.
"""
