"""Microbenchmarks, one file for each primitive. `python -m bench` lists them."""
