# SPDX-License-Identifier: Apache-2.0
"""The accuracy rule for products with an NF4 weight and for every gradient of the adapted layers."""

from __future__ import annotations

import pytest
import torch

from pyfast import ops
from pyfast.testing import assert_accurate, seeded
from tests.cases import packed

F = torch.nn.functional
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [0, 1, 3, 129]
RANKS = [1, 3, 64, 100]
SIZES = [(37, 100), (130, 77)]


def check(ours, plain, names, tensors):
    """Compare y and all gradients of ours with those of the composition in the same dtype and float64.

    With few rows, errors of many draws are pooled: one lucky rounding of a handful says nothing.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    draws = 8 if 0 < tensors[0].shape[0] < 100 else 1
    pools = [[[] for _ in range(len(tensors) + 1)] for _ in range(3)]
    for draw in range(draws):
        spread = 1 + draw / draws  # fresh roundings, of the same size
        results = []
        cotangent = None
        for function, kind in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
            leaves = [(t.detach() * spread).to(kind).requires_grad_() for t in tensors]
            y = function(*leaves)
            if cotangent is None:
                cotangent = seeded(y.shape, seed=77 + draw, dtype=dtype, device=device)
            results.append([y, *torch.autograd.grad(y, leaves, cotangent.to(kind))])
        for pool, values in zip(pools, results, strict=True):
            for collected, value in zip(pool, values, strict=True):
                collected.append(value.detach().flatten())
    for name, *collected in zip(["y", *names], *pools, strict=True):
        got, same, exact = (torch.cat(values) for values in collected)
        assert got.dtype == dtype
        assert_accurate(got, same, exact, what=name)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_linear(dtype, size, nested, device):
    n, k = size
    codes, absmax, inner, offset = packed(n, k, device, nested=nested)
    scales = {"nested_absmax": inner, "nested_offset": offset}
    # The product is compared, not the quantisation.
    w = ops.nf4_dequantize(codes, absmax, size, dtype, **scales)

    def ours(x, bias):
        return ops.nf4_linear(x, codes, absmax, bias, out_features=n, **scales)

    for rows in ROWS:
        x = seeded((rows, k), seed=1, dtype=dtype, device=device)
        bias = seeded((n,), seed=2, dtype=dtype, device=device)
        check(ours, lambda x, bias: F.linear(x, w.to(x.dtype), bias), ["dx", "dbias"], [x, bias])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_over_nf4(dtype, size, rank, device):
    n, k = size
    codes, absmax, inner, offset = packed(n, k, device, nested=True)
    scales = {"nested_absmax": inner, "nested_offset": offset}
    w = ops.nf4_dequantize(codes, absmax, size, dtype, **scales)

    def ours(x, bias, a, b):
        return ops.lora_linear(x, codes, a, b, scale=0.7, bias=bias, absmax=absmax, **scales)

    def plain(x, bias, a, b):
        return F.linear(x, w.to(x.dtype), bias) + F.linear(F.linear(x, a), b) * 0.7

    for rows in ROWS:
        x = seeded((rows, k), seed=1, dtype=dtype, device=device)
        bias = seeded((n,), seed=3, dtype=dtype, device=device)
        a = seeded((rank, k), seed=4, dtype=dtype, device=device, scale=k**-0.5)
        b = seeded((n, rank), seed=5, dtype=dtype, device=device, scale=rank**-0.5)
        check(ours, plain, ["dx", "dbias", "da", "db"], [x, bias, a, b])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_with_a_trained_weight(dtype, size, device):
    n, k = size
    for rows, rank in zip(ROWS, RANKS, strict=True):
        shapes = [(rows, k), (n, k), (n,), (rank, k), (n, rank)]
        scales = [1.0, k**-0.5, 1.0, k**-0.5, rank**-0.5]
        tensors = [
            seeded(shape, seed=i, dtype=dtype, device=device, scale=scale)
            for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
        ]
        check(
            lambda x, w, bias, a, b: ops.lora_linear(x, w, a, b, scale=1.7, bias=bias),
            lambda x, w, bias, a, b: F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 1.7,
            ["dx", "dw", "dbias", "da", "db"],
            tensors,
        )
