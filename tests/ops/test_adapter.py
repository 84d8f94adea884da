# SPDX-License-Identifier: Apache-2.0
"""adapter_scale and adapter_bottleneck against plain torch modules."""

from __future__ import annotations

import pytest
import torch

from pyfast import ops
from pyfast.testing import assert_accurate, seeded
from tests.cases import bottleneck_args

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


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scaled_product_is_formed_in_float32_and_rounded_once(dtype, kind, device):
    dense = seeded((64, 7, 4), seed=1, dtype=dtype, device=device)
    scale = seeded((64,), seed=2, dtype=kind, device=device).requires_grad_()
    for x in (dense.view(28, 64), dense.permute(2, 1, 0)):  # rows, and columns outermost
        leaf = x.detach().requires_grad_()
        y = ops.adapter_scale(leaf, scale)
        dy = seeded(y.shape, seed=3, dtype=dtype, device=device)
        dx, dscale = torch.autograd.grad(y, (leaf, scale), dy)
        assert y.is_contiguous()
        assert torch.equal(y, (x.float() * scale.float()).to(dtype))
        assert torch.equal(dx, (dy.float() * scale.float()).to(dtype))
        exact = (dy.double() * x.double()).flatten(0, -2).sum(0)
        torch.testing.assert_close(dscale, exact.to(kind))


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


@pytest.mark.parametrize("norm", [False, True])
def test_a_bottlenecks_backward_gives_what_is_wanted_and_nothing_else(norm, device):
    case = bottleneck_args(
        (5,), 12, 3, device, torch.float32, norm=norm, biases=True, activation="silu"
    )
    x, down, up, _, _, norm_weight, norm_bias, *constants = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in case
    )
    dy, h = seeded((5, 12), seed=9, device=device), seeded((5, 3), seed=10, device=device)
    backward = ops.OPS["adapter_bottleneck_backward"].overload

    def grads(wanted):
        return backward(dy, h, x, down, up, norm_weight, norm_bias, *constants, wanted)

    count = 7 if norm else 5
    every = grads([i < count for i in range(7)])
    for one in range(count):
        for i, grad in enumerate(grads([i == one for i in range(7)])):
            assert torch.equal(grad, every[i] if i == one else grad.new_empty(0))


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
