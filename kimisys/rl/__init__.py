"""Algorithms as pure functions on tensors and records, to be read beside the paper."""
