# SPDX-License-Identifier: Apache-2.0
"""Products of many rows from the packed bytes of an NF4 weight: exact weights, sums near to float64."""

from __future__ import annotations

import pytest
import torch

from pyfast import ops
from pyfast.ops import _nf4_gemm
from pyfast.testing import seeded
from tests.cases import packed
from tests.ops.test_nf4_few_rows_cuda import SM90, dense, rms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not SM90, reason="kernels for sm_90a")]

HALVES = (torch.bfloat16, torch.float16)
KERNEL = "nf4_gemm_sm90"
NARROW = f"{KERNEL}_narrow"
# W by out feature or not, and the kernel.
WAYS = [(True, KERNEL), (True, NARROW), (False, KERNEL)]
# Of W: ragged rows and columns, fewer than a tile, several waves of tiles.
SHAPES = [(1000, 512), (8, 64), (4096, 4096), (392, 1088), (20000, 320)]


def product(x, parts, n, by_out, kernel=KERNEL, **others):
    """x W^T, or x W where W is not `by_out`, of n columns."""
    codes, absmax, inner, offset = parts
    out = torch.full((len(x), n), float("nan"), dtype=x.dtype, device="cuda")
    name = _nf4_gemm.gemm(
        out, x, codes, absmax, 64, inner, offset, by_out=by_out, kernel=kernel, **others
    )
    assert name == kernel
    return out


@pytest.mark.parametrize(("by_out", "kernel"), WAYS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_hot_rows_give_the_weights_bit_for_bit(shape, dtype, nested, by_out, kernel):
    parts = packed(*shape, "cuda", nested=nested)
    weights = dense(parts, *shape, dtype)
    weights = weights.t() if by_out else weights
    x = torch.eye(len(weights), dtype=dtype, device="cuda")
    got = product(x, parts, weights.shape[1], by_out, kernel)
    assert torch.equal(got.view(torch.int16), (weights + 0.0).view(torch.int16))


@pytest.mark.parametrize("rank", [0, 5, 16, 64, 100])
@pytest.mark.parametrize(("by_out", "kernel"), WAYS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_float64_than_a_product_rounded_once(shape, dtype, by_out, kernel, rank):
    rows, columns = shape
    parts = packed(rows, columns, "cuda", nested=True)
    weights = dense(parts, rows, columns, dtype).double()
    weights = weights if by_out else weights.t()
    n, k = weights.shape
    for m in (1, 63, 256, 257, 700, 1025):
        x = seeded((m, k + 64), seed=m, dtype=dtype, device="cuda")[:, :k]
        bias = seeded((n,), seed=3, dtype=dtype, device="cuda") if m % 2 else None
        exact = x.double() @ weights.T
        low = {}
        if rank:
            z = torch.zeros(m, -(-rank // 8) * 8, dtype=dtype, device="cuda")
            z[:, :rank] = seeded((m, rank), seed=5, dtype=dtype, device="cuda")
            factor = seeded((n, rank) if by_out else (rank, n), seed=6, device="cuda")
            low = {"z": z, "factor": factor}
            used = factor.to(dtype).double()
            exact = exact + z[:, :rank].double() @ (used.T if by_out else used)
        exact = exact + (0.0 if bias is None else bias.double())
        y = product(x, parts, n, by_out, kernel, bias=bias, **low)
        few = 2.0 if m * n < 100 else 1.2 if m * n < 10_000 else 1.01
        assert rms(y, exact) <= few * rms(exact.to(dtype), exact), m
        assert torch.equal(y, product(x, parts, n, by_out, kernel, bias=bias, **low))


@pytest.mark.parametrize(("by_out", "kernel"), WAYS)
def test_hostile_scales_and_inputs(by_out, kernel):
    """A NaN scale spoils its own row of W, an infinite x its own row; what lies past the end nothing."""
    rows, columns, m = 1000, 512, 300
    codes, absmax, inner, offset = packed(rows, columns, "cuda")
    absmax[7 * columns // 64] = float("nan")
    n, k = (rows, columns) if by_out else (columns, rows)
    x = seeded((m, k), seed=1, dtype=torch.bfloat16, device="cuda")
    x[m // 2, 3] = float("inf")
    finite = torch.isfinite(product(x, (codes, absmax, inner, offset), n, by_out, kernel))
    spoilt = torch.zeros_like(finite)
    spoilt[:, 7 if by_out else slice(64)] = True
    spoilt[m // 2] = True
    assert finite[~spoilt].all()
    assert not finite[:, 7].any()


def test_on_a_side_stream_and_in_a_graph():
    n, k, m = 4096, 4096, 1024
    parts = packed(n, k, "cuda", nested=True)
    x = seeded((m, k), seed=1, dtype=torch.bfloat16, device="cuda")
    later = seeded((m, k), seed=2, dtype=torch.bfloat16, device="cuda")
    expected, expected_later = (product(each, parts, n, True) for each in (x, later))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        held = torch.zeros_like(x)
        torch.cuda._sleep(2_000_000)
        held.copy_(x)
        assert torch.equal(product(held, parts, n, True), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = product(held + 0, parts, n, True)
        held.copy_(later)
        graph.replay()
        stream.synchronize()
    assert torch.equal(got, expected_later)


# 7168 out features are two waves of tiles, narrow ones too.
@pytest.mark.parametrize(("n", "kernel"), [(4096, KERNEL), (7168, NARROW)])
@pytest.mark.parametrize("dtype", HALVES)
def test_layers_are_served_both_ways(dtype, n, kernel):
    k = 4096
    codes, absmax, inner, offset = parts = packed(n, k, "cuda", nested=True)
    weights = dense(parts, n, k, dtype).double()
    x = seeded((2, 512, k), seed=1, dtype=dtype, device="cuda").requires_grad_()
    dy = seeded((2, 512, n), seed=2, dtype=dtype, device="cuda")
    scales = {"nested_absmax": inner, "nested_offset": offset}
    with ops.recorded_kernels() as ran:
        y = ops.nf4_linear(x, codes, absmax, out_features=n, **scales)
        y.backward(dy)
    assert ran == [
        ("nf4_gemm", kernel),
        ("nf4_linear", kernel),
        ("nf4_gemm", KERNEL),
        ("nf4_linear_backward", KERNEL),
    ]
    for value, exact in ((y, x.double() @ weights.T), (x.grad, dy.double() @ weights)):
        assert rms(value, exact) <= 1.01 * rms(exact.to(dtype), exact)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
# Up to 16 ranks a dense GEMM that makes dz, dA and dB on the way is faster.
@pytest.mark.parametrize(("rank", "both_ways"), [(4, False), (16, False), (60, True), (64, True)])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_lora_is_inside(factors, rank, both_ways, dropout):
    n, k, m, scale = 4096, 4096, 1024, 2.0
    codes, absmax, inner, offset = parts = packed(n, k, "cuda", nested=True)
    w = dense(parts, n, k, torch.bfloat16).double()
    x = seeded((m, k), seed=1, dtype=torch.bfloat16, device="cuda").requires_grad_()
    bias = seeded((n,), seed=7, dtype=torch.bfloat16, device="cuda")
    a = seeded((rank, k), seed=2, dtype=factors, device="cuda", scale=0.05).requires_grad_()
    b = seeded((n, rank), seed=3, dtype=factors, device="cuda", scale=0.5).requires_grad_()
    dy = seeded((m, n), seed=4, dtype=torch.bfloat16, device="cuda")
    scales = {"absmax": absmax, "nested_absmax": inner, "nested_offset": offset}
    torch.manual_seed(0)
    with ops.recorded_kernels() as ran:
        y = ops.lora_linear(x, codes, a, b, scale=scale, bias=bias, dropout=dropout, **scales)
        y.backward(dy)
    served = dict(ran)
    assert served["lora_linear"] == KERNEL
    # The mask of dx is drawn where the low-rank product is added.
    assert (served["lora_linear_backward"] == KERNEL) == (both_ways and dropout == 0.0)
    torch.manual_seed(0)
    kept = ops.dropout(torch.ones_like(x, dtype=torch.float32), dropout).double()
    x64, a64, b64, dy64 = x.double(), a.double(), b.double(), dy.double()
    z, dz = scale * (x64 * kept) @ a64.T, scale * dy64 @ b64
    expected = {
        "y": (y, x64 @ w.T + bias.double() + z @ b64.T),
        "dx": (x.grad, dy64 @ w + kept * (dz @ a64)),
        "dA": (a.grad, dz.T @ (x64 * kept)),
        "dB": (b.grad, dy64.T @ z),
    }
    for name, (value, exact) in expected.items():
        assert rms(value, exact) < 6e-3, name
