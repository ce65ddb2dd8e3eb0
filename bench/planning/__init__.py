"""Planning at the scale of Kimi-K2: cases of `python -m bench reshard`."""
