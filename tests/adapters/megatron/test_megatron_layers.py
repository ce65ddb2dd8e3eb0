"""Our parts of Megatron's layer spec against plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kimisys.adapters.megatron.layers import CausalAttention, RMSNorm


@pytest.mark.parametrize("shape", [(3, 5, 32), (3, 5, 2, 8)])
def test_rms_norm_is_torch_s_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden = shape[-1]
    ours = RMSNorm(SimpleNamespace(params_dtype=torch.float64), hidden, 1e-2)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(hidden))
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    wanted = torch.nn.functional.rms_norm(x.double(), (hidden,), ours.weight, 1e-2)
    found = ours(x)
    torch.testing.assert_close(found, wanted.float())
    for one, other in zip(
        torch.autograd.grad(found, [x, ours.weight], grad),
        torch.autograd.grad(wanted, [x, ours.weight], grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rms_norm_computes_bfloat16_in_float32() -> None:
    torch.manual_seed(0)
    ours = RMSNorm(SimpleNamespace(params_dtype=torch.bfloat16), 64, 1e-6)
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    found = ours(x)
    assert found.dtype == torch.bfloat16
    wanted = torch.nn.functional.rms_norm(x.float(), (64,), None, 1e-6)
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=0, atol=0)
    found.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert ours.weight.grad is not None and ours.weight.grad.dtype == torch.bfloat16


def test_attention_is_causal_and_grouped() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(7, 2, 4, 8), torch.randn(7, 2, 2, 8), torch.randn(7, 2, 2, 8)
    found = CausalAttention(config=None)(query, key, value, None)
    for head in range(4):
        q, k, v = query[:, :, head], key[:, :, head // 2], value[:, :, head // 2]
        scores = torch.einsum("sbd,tbd->bst", q, k) / 8**0.5
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        wanted = torch.einsum("bst,tbd->sbd", scores.softmax(-1), v)
        torch.testing.assert_close(found[..., head * 8 : head * 8 + 8], wanted)
