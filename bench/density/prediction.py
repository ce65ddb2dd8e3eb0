"""What rounding alone says about the density: how likely a small move changes a weight's bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FRACTION_BITS = 7  # of bfloat16, beside the leading one that is not stored
_SMALLEST_EXPONENT = -126  # below it the spacing stays as it is

Floats = npt.NDArray[np.float32]


def spacing(weights: Floats) -> Floats:
    """The distance between neighbouring bfloat16 numbers around each weight, float32 like it:
    2^-8 to 2^-7 of the weight's size."""
    _, exponents = np.frexp(weights)  # |w| = m · 2^e with m in [0.5, 1); e is 0 at 0
    exponents = np.where(weights == 0, _SMALLEST_EXPONENT, exponents - 1)
    exponents = np.maximum(exponents, _SMALLEST_EXPONENT)
    return np.ldexp(np.float32(1), exponents - FRACTION_BITS).astype(np.float32)


def predicted_density(weights: Floats, moves: Floats | float) -> float:
    """The share of `weights` whose bfloat16 bits a move by `moves` is expected to change.

    Rounding borders lie one `spacing` apart and a float32 weight lies anywhere between two of them,
    so a move by d crosses one with probability min(1, |d| / spacing).
    """
    chances = np.minimum(np.abs(moves) / spacing(weights), 1.0)
    return float(chances.mean(dtype=np.float64))
