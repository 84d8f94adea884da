# SPDX-License-Identifier: Apache-2.0
"""scaled_linear on CUDA: which kernels run, and how near they are to float64."""

from __future__ import annotations

import pytest
import torch

from pyfast import ops
from pyfast.testing import assert_accurate, seeded

F = torch.nn.functional
SHAPES = [
    # rows, out and in features
    (1, 8, 8),
    (7, 136, 8),
    (128, 64, 256),
    (129, 72, 264),
    (300, 512, 1032),
    (257, 8, 2056),
    (1000, 4096, 4104),
    (8191, 1032, 1032),
    (130, 4096, 14336),
    (4200, 4096, 1032),
]
GEMM = ("scaled_linear_backward", "scaled_linear_backward_sm90")


def is_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


pytestmark = pytest.mark.gpu
hopper = pytest.mark.skipif(not is_hopper(), reason="the GEMM is for compute capability 9.0")


def tensors(shape, dtype=torch.bfloat16, kind=torch.float32):
    """x, the scale, the bias; W and dy."""
    m, n, k = shape
    x, dy = (
        seeded(size, seed=i, dtype=dtype, device="cuda") for i, size in ((1, (m, k)), (2, (m, n)))
    )
    w = seeded((n, k), seed=3, dtype=dtype, device="cuda", scale=k**-0.5)
    scale = 1 + seeded((k,), seed=4, dtype=kind, device="cuda", scale=0.3)
    leaves = [x, scale, seeded((n,), seed=5, dtype=dtype, device="cuda")]
    return [leaf.detach().requires_grad_() for leaf in leaves], w, dy


def plain(x, w, scale, bias):
    """The scaled input rounded once."""
    wide = torch.promote_types(x.dtype, scale.dtype)
    return F.linear((x.to(wide) * scale.to(wide)).to(x.dtype), w, bias)


def run(function, leaves, w, dy, dtype=None):
    """y and the gradients of x, the scale and the bias."""
    if dtype is not None:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        w, dy = w.to(dtype), dy.to(dtype)
    x, scale, bias = leaves
    y = function(x, w, scale, bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def recorded(leaves, w, dy):
    with ops.recorded_kernels() as ran:
        got = run(ops.scaled_linear, leaves, w, dy)
    return got, ran


@hopper
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_near_to_float64_as_torch(shape, kind):
    made = tensors(shape, kind=kind)
    got, ran = recorded(*made)
    first = "scaled_linear_weight" if shape[0] > shape[1] else "scaled_linear_input"
    assert [entry for entry in ran if entry[0].startswith("scaled")] == [
        ("scaled_linear", first), GEMM
    ]  # fmt: skip
    assert ("adapter_scale_backward", "adapter_scale_backward_cuda") not in ran
    rough, exact = run(plain, *made), run(plain, *made, dtype=torch.float64)
    for name, g, r, e in zip(("y", "dx", "dscale", "dbias"), got, rough, exact, strict=True):
        assert g.dtype == r.dtype
        few = e.numel() < 10_000  # the rule is for many values
        assert_accurate(g, r, e, what=name, eps=4e-3 if few else 1e-5)


@hopper
def test_the_shape_of_llamas_mlp():
    (x, scale, bias), w, dy = tensors((8192, 4096, 14336))
    (y, dx, dscale, _), ran = recorded([x, scale, bias], w, dy)
    assert GEMM in ran
    exact_scale = torch.zeros_like(dscale, dtype=torch.float64)
    wide, factors = w.double(), scale.detach().double()
    for rows in range(0, 8192, 2048):
        part = slice(rows, rows + 2048)
        x_mk, product = x.detach()[part].double(), dy[part].double() @ wide
        exact_scale += (product * x_mk).sum(0)
        for got, exact, most in (
            (y, (x_mk * factors) @ wide.t() + bias.detach(), 4e-3), (dx, product * factors, 2e-3)
        ):  # fmt: skip
            assert (got[part].double() - exact).norm() <= most * exact.norm()
    assert (dscale.double() - exact_scale).abs().max() <= 1e-4 * exact_scale.abs().max()


@hopper
def test_the_sums_are_those_of_float32():
    (x, scale, bias), w, dy = tensors((8191, 512, 1032))
    _, _, dscale, _ = run(ops.scaled_linear, [x, scale, bias], w, dy)
    exact = (dy.double() @ w.double() * x.detach().double()).sum(0)
    assert (dscale.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


@hopper
def test_layouts():
    (x, scale, bias), w, dy = tensors((300, 136, 264))
    want = run(ops.scaled_linear, [x, scale, bias], w, dy)
    wide = [torch.cat([t, t], 1) for t in (x.detach(), w, dy)]
    pitched_x, pitched_w, pitched_dy = (t[:, t.shape[1] // 2 :] for t in wide)
    for inputs in (pitched_x, x.detach().t().contiguous().t(), x.detach().view(3, 100, 264)):
        for grad in (pitched_dy, dy.t().contiguous().t()):
            leaf = inputs.detach().requires_grad_()
            with ops.recorded_kernels() as ran:
                y = ops.scaled_linear(leaf, pitched_w, scale, bias)
                grads = torch.autograd.grad(y, (leaf, scale), grad.reshape(y.shape))
            assert GEMM in ran
            assert torch.equal(grads[0].reshape(300, 264), want[1])
            assert torch.equal(grads[1], want[2])


@hopper
def test_gradients_that_nobody_wants():
    (x, scale, bias), w, dy = tensors((300, 136, 264))
    want = run(ops.scaled_linear, [x, scale, bias], w, dy)
    with ops.recorded_kernels() as ran:
        y = ops.scaled_linear(x, w, scale.detach(), bias)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], want[1])
    assert GEMM in ran
    with ops.recorded_kernels() as ran:
        y = ops.scaled_linear(x.detach(), w, scale, bias)
        torch.testing.assert_close(
            torch.autograd.grad(y, scale, dy)[0], want[2], rtol=0.02, atol=0.1
        )
    assert GEMM not in ran


@hopper
@pytest.mark.parametrize("shape", [(300, 512, 1032), (2048, 4096, 14336)], ids=str)
def test_results_repeat_and_a_replayed_graph_gives_them(shape):
    made = tensors(shape)
    first = run(ops.scaled_linear, *made)
    for _ in range(10):
        assert all(map(torch.equal, run(ops.scaled_linear, *made)[1:3], first[1:3]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(ops.scaled_linear, *made)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(map(torch.equal, captured[1:3], first[1:3]))
    for got, want in zip(captured, first, strict=True):  # the others are made by torch
        torch.testing.assert_close(got, want)


@hopper
def test_what_is_not_finite_stays_where_it_is():
    """In rows and columns at the edges of tiles, and beside them."""
    (x, scale, bias), w, dy = tensors((300, 136, 264))
    clean = run(ops.scaled_linear, [x, scale, bias], w, dy)
    for row, column in ((0, 0), (299, 263), (127, 255), (128, 256)):
        bad = x.detach().clone()
        bad[row, column] = float("nan")
        _, dx, dscale, _ = run(ops.scaled_linear, [bad.requires_grad_(), scale, bias], w, dy)
        assert torch.equal(dx, clean[1])  # without x
        assert dscale.isnan().nonzero().flatten().tolist() == [column]
        grad = dy.clone()
        grad[row] = float("inf")
        _, dx, dscale, _ = run(ops.scaled_linear, [x, scale, bias], w, grad)
        others = torch.arange(300, device="cuda") != row
        assert torch.equal(dx[others], clean[1][others])
        assert not dscale.isfinite().any()


@hopper
@pytest.mark.parametrize(
    ("shape", "dtype", "change", "reason"),
    [
        ((40, 64, 64), torch.float16, None, "the GEMM is for bfloat16, not torch.float16"),
        ((40, 64, 64), torch.float32, None, "the GEMM is for bfloat16, not torch.float32"),
        ((40, 60, 64), torch.bfloat16, None, "must be multiples of 8, got 64 and 60"),
        ((40, 64, 60), torch.bfloat16, None, "the weight must be stored by out feature"),
        ((40, 4096, 1024), torch.bfloat16, None, "torch's GEMM is faster for 40 rows"),
        ((40, 64, 64), torch.bfloat16, "t", "the weight must be stored by out feature"),
    ],
)
def test_what_the_gemm_does_not_serve_is_composed_and_says_why(shape, dtype, change, reason):
    leaves, w, dy = tensors(shape, dtype)
    if change:
        w = w.t().contiguous().t()
    got, ran = recorded(leaves, w, dy)
    names = [kernel for op, kernel in ran if op == "scaled_linear_backward"]
    assert len(names) == 1
    assert names[0].startswith("scaled_linear_backward_torch (")
    assert reason in names[0]
    for g, e in zip(got, run(plain, leaves, w, dy, dtype=torch.float64), strict=True):
        assert (g.double() - e).norm() <= 0.02 * e.norm()


@hopper
def test_compiled_and_under_autocast():
    leaves, w, dy = tensors((300, 136, 264))
    want = run(ops.scaled_linear, leaves, w, dy)
    compiled = torch.compile(ops.scaled_linear, fullgraph=True, backend="aot_eager")
    with ops.recorded_kernels() as ran:
        got = run(compiled, leaves, w, dy)
    assert GEMM in ran
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e)
    with torch.autocast("cuda", torch.bfloat16), ops.recorded_kernels() as ran:
        got = run(ops.scaled_linear, leaves, w, dy)
    assert GEMM in ran
    assert all(map(torch.equal, got[1:3], want[1:3]))
