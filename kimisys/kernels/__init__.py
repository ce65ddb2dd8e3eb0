"""Triton kernels, each with a CPU path of the same name. Triton is imported when one is needed."""
