# SPDX-License-Identifier: Apache-2.0
"""adapter_scale and adapter_bottleneck against plain torch modules."""

from __future__ import annotations

import pytest
import torch

from pyfast import ops
from pyfast.testing import assert_accurate, seeded

F = torch.nn.functional


def grads(function, inputs, dy):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 129])
def test_scale(rows, dtype, device):
    x, dy = (seeded((rows, 50), seed=s, dtype=dtype, device=device) for s in (1, 2))
    scale = seeded((50,), seed=3, dtype=dtype, device=device)
    exact = grads(torch.mul, (x.double(), scale.double()), dy.double())
    plain = grads(torch.mul, (x, scale), dy)
    for got, rough, true in zip(
        grads(ops.adapter_scale, (x, scale), dy), plain, exact, strict=True
    ):
        assert got.dtype == dtype
        assert_accurate(got, rough, true)


def test_a_float32_scale_on_half_activations_rounds_once(device):
    x = seeded((4, 32), seed=1, dtype=torch.bfloat16, device=device)
    scale = seeded((32,), seed=2, device=device)
    assert torch.equal(ops.adapter_scale(x, scale), (x.float() * scale).bfloat16())


def module(x, down, up, down_bias, up_bias, norm_weight, norm_bias, activation):
    """The adapter as torch modules would compute it."""
    h = x
    if norm_weight is not None:
        h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    h = getattr(F, activation)(F.linear(h, down, down_bias))
    return x + F.linear(h, up, up_bias)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bottleneck(dtype, norm, activation, device):
    k, r, rows = 66, 9, 65
    shapes = [(rows, k), (r, k), (k, r), (r,), (k,)] + ([(k,), (k,)] if norm else [])
    scales = [1, k**-0.5, r**-0.5, 1, 1, 1, 1]
    inputs = [
        seeded(s, seed=i, dtype=dtype, device=device, scale=c)
        for i, (s, c) in enumerate(zip(shapes, scales, strict=False))
    ]
    dy = seeded((rows, k), seed=20, dtype=dtype, device=device)

    def reference(*t):
        return module(*t, *([None, None] if not norm else []), activation)

    def ours(x, down, up, down_bias, up_bias, norm_weight=None, norm_bias=None):
        return ops.adapter_bottleneck(
            x, down, up, down_bias=down_bias, up_bias=up_bias, norm_weight=norm_weight,
            norm_bias=norm_bias, activation=activation,
        )  # fmt: skip

    exact = grads(reference, [t.double() for t in inputs], dy.double())
    plain = grads(reference, inputs, dy)
    for got, rough, true in zip(grads(ours, inputs, dy), plain, exact, strict=True):
        assert_accurate(got, rough, true)


def test_a_zero_up_projection_is_the_identity(device):
    x = seeded((3, 16), seed=1, device=device)
    down, up = seeded((4, 16), seed=2, device=device), torch.zeros(16, 4, device=device)
    assert torch.equal(ops.adapter_bottleneck(x, down, up, norm_weight=torch.ones_like(x[0])), x)


def test_error_texts():
    x = torch.zeros(2, 16)
    with pytest.raises(
        ValueError, match=r"adapter_scale: scale must have shape \[16\], got \[15\]"
    ):
        ops.adapter_scale(x, torch.zeros(15))
    down, up = torch.zeros(4, 16), torch.zeros(16, 4)
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        ops.adapter_bottleneck(x, down, up, activation="tanh")
    with pytest.raises(ValueError, match=r"up must have shape \[16, 4\], got \[16, 5\]"):
        ops.adapter_bottleneck(x, down, torch.zeros(16, 5))
