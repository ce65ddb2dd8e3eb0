"""float8 with block scales as its definition says it, for tests."""

from __future__ import annotations

import torch


def quantized_by_loops(
    weights: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as uint8 and scales, by loops over blocks and PyTorch's own cast."""
    rows, columns = weights.shape
    values = torch.zeros((rows, columns), dtype=torch.float8_e4m3fn)
    scales = torch.zeros((-(-rows // block[0]), -(-columns // block[1])))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            part = weights[at].float()
            scales[i, j] = part.abs().amax().clamp(1e-4) / 448.0
            values[at] = (part * (1.0 / scales[i, j])).to(torch.float8_e4m3fn)
    return values.view(torch.uint8), scales
