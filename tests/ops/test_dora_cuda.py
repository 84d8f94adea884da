# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of DoRA: which one runs, and how near it is to float64."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from pyfast import _extension, ops
from pyfast.ops import _library
from pyfast.testing import assert_accurate, seeded
from tests.cases import packed

pytestmark = pytest.mark.gpu

# M, K, N: in the backward c scales dy, except where M >= 2 K, where it scales W.
SHAPES = [
    (130, 1032, 520), (513, 136, 512), (700, 512, 264), (1100, 136, 1032), (1, 64, 64),
    (1032, 520, 4104),
]  # fmt: skip
SCALE = 0.75


def operands(m, k, n, r, adapter=torch.float32, by_out=True, dtype=torch.bfloat16):
    """x, W, A, B, the magnitudes and dy; the third row of W + s B A is zero, the fourth's magnitude."""
    x = seeded((m, k), seed=1, dtype=dtype, device="cuda")
    w = seeded((n, k), seed=2, dtype=dtype, device="cuda", scale=k**-0.5)
    a = seeded((r, k), seed=3, dtype=adapter, device="cuda", scale=k**-0.5)
    b = seeded((n, r), seed=4, dtype=adapter, device="cuda", scale=r**-0.5)
    w[2], b[2] = 0, 0
    near = 1 + seeded((n,), seed=5, device="cuda", scale=0.2)
    magnitude = (near * exact_norms(w, a, b)).to(adapter)
    magnitude[3] = 0
    dy = seeded((m, n), seed=6, dtype=dtype, device="cuda")
    w = w if by_out else w.t().contiguous().t()
    return x, w, a, b, magnitude, dy


def exact_norms(w, a, b):
    return torch.linalg.vector_norm(w.double() + SCALE * b.double() @ a.double(), dim=1)


def results(x, w, a, b, magnitude, dy, function):
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, magnitude)]
    y = function(leaves[0], w, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def plain(x, w, a, b, magnitude):
    """PEFT's composition in x's dtype."""
    low = torch.float64 if x.dtype is torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(w.to(low) + SCALE * b.to(low) @ a.to(low), dim=1).detach()
    c = (magnitude / norms.masked_fill(norms == 0, 1)).to(x.dtype)
    base, update = x @ w.t(), x @ a.to(x.dtype).t() @ b.to(x.dtype).t()
    return base + ((c - 1) * base + c * update * SCALE)


def ours(x, w, a, b, magnitude):
    norms = ops.dora_norms(w, a, b, scale=SCALE)
    return ops.dora_linear(x, w, a, b, magnitude, norms, scale=SCALE)


def served(m, k, n, by_out=True):
    """The kernels of both directions: our GEMM scales y as it stores it, with W by out feature."""
    pitch = k if by_out else n
    gemm, _ = _extension.C.lora_gemm_name(0, m, n, k, pitch, by_out, False)
    return {
        "dora_linear": f"dora_linear_{'epilogue' if gemm and by_out else 'columns'}",
        "dora_linear_backward": f"dora_linear_{'weight' if m >= 2 * k else 'columns'}",
    }


def test_shapes_have_all_kernels():
    found = [served(*shape) for shape in SHAPES]
    for op in ("dora_linear", "dora_linear_backward"):
        assert len({kernels[op] for kernels in found}) == 2


@contextlib.contextmanager
def sm80():
    _extension.C.lora_force_sm(80)
    try:
        yield
    finally:
        _extension.C.lora_force_sm(0)


def check(args, found, exact=None):
    exact = exact or results(*(t.double() for t in args), plain)
    rough = results(*args, plain)
    for name, got, low, right in zip(
        ("y", "dx", "dA", "dB", "dm"), found, rough, exact, strict=True
    ):
        # Few values: single roundings decide.
        eps = 1e-5 if right.numel() >= 10_000 else 5e-3
        assert_accurate(got, low, right, what=name, eps=eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 100, 128])
@pytest.mark.parametrize(("n", "k"), [(37, 8), (33, 136), (520, 4104), (4096, 1024)])
def test_norms(n, k, rank, dtype):
    for adapter in (torch.float32, dtype):
        _, w, a, b, *_ = operands(1, k, n, rank, adapter, dtype=dtype)
        w[4] = (-SCALE * b.double() @ a.double()).to(dtype)[4]
        with _library.recorded_kernels() as kernels:
            norms = ops.dora_norms(w, a, b, scale=SCALE)
        assert kernels == [("dora_norms", "dora_norms_mma")]
        right = exact_norms(w, a, b)
        error = (norms.double() - right).abs()
        assert norms[2] == 0
        # Of the row that nearly cancels the digits are those of the sum's parts.
        parts = torch.linalg.vector_norm(w[4].double())
        assert error[4] <= 3e-6 * parts
        error[4] = 0
        assert (error <= 2e-6 * right).all(), (error / right).max()
        assert torch.equal(norms, ops.dora_norms(w, a, b, scale=SCALE))


def test_norms_that_the_kernel_does_not_make():
    for shape, by_out in (
        ((1, 20, 16, 4), True),
        ((1, 64, 64, 200), True),
        ((1, 64, 64, 8), False),
    ):
        _, w, a, b, *_ = operands(*shape, by_out=by_out)
        with _library.recorded_kernels() as kernels:
            norms = ops.dora_norms(w, a, b, scale=SCALE)
        assert kernels[0][1].startswith("dora_norms_torch (")
        torch.testing.assert_close(norms.double(), exact_norms(w, a, b), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 100])
def test_is_as_near_to_float64_as_torch(shape, rank):
    for adapter, by_out in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        args = operands(*shape, rank, adapter, by_out)
        with _library.recorded_kernels() as kernels:
            found = results(*args, ours)
        names = {op: kernel for op, kernel in kernels if op.startswith("dora_linear")}
        assert names == served(*shape, by_out)
        check(args, found)
        assert all(torch.equal(t, u) for t, u in zip(found, results(*args, ours), strict=True))
        assert found[0][:, 3].abs().max() < 1e-15  # the magnitude 0
        assert found[4][3].abs() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_nf4(shape, nested):
    _, k, n = shape
    x, _, a, b, magnitude, dy = operands(*shape, 16)
    codes, absmax, inner, offset = packed(n, k, "cuda", nested=nested)
    parts = {"absmax": absmax, "nested_absmax": inner, "nested_offset": offset}
    w = ops.nf4_dequantize(codes, absmax, (n, k), nested_absmax=inner, nested_offset=offset)

    def quantized(x, w, a, b, magnitude):
        norms = ops.dora_norms(w, a, b, scale=SCALE)
        return ops.dora_linear(x, codes, a, b, magnitude, norms, scale=SCALE, **parts)

    args = (x, w, a, b, magnitude, dy)
    check(args, results(*args, quantized))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("view", [False, True])
def test_a_caller_may_change_y_in_place(shape, view):
    args = operands(*shape, 16)

    def mutating(x, w, a, b, magnitude):
        y = ours(x, w, a, b, magnitude)
        (y.view(-1) if view else y).mul_(0)
        return y

    expected = results(*args, ours)
    x, w, a, b, magnitude, dy = args
    magnitude = magnitude.detach().requires_grad_()
    y = ours(x, w, a, b, magnitude)
    node = y.grad_fn
    with torch.no_grad():
        (y.view(-1) if view else y).mul_(0)
    assert node is y.grad_fn
    (found,) = torch.autograd.grad(y, magnitude, dy)
    assert torch.equal(found, expected[4])
    assert all((t == 0).all() for t in results(*args, mutating))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_layouts_of_x_dy_and_w(shape):
    m, k, n = shape
    args = operands(*shape, 8)
    x, w, a, b, magnitude, dy = args
    expected = results(*args, ours)
    wide_x, wide_w, wide_dy = (
        torch.full((rows, columns + 24), torch.nan, dtype=torch.bfloat16, device="cuda")
        for rows, columns in ((m, k), (n, k), (m, n))
    )
    for start in (8, 3):
        wide_x[:, start : start + k], wide_w[:, start : start + k] = x, w
        wide_dy[:, start : start + n] = dy
        found = results(
            wide_x[:, start : start + k], wide_w[:, start : start + k], a, b, magnitude,
            wide_dy[:, start : start + n], ours,
        )  # fmt: skip
        check(args, found)
    found = results(x, w, a, b, magnitude, dy.t().contiguous().t(), ours)
    assert all(torch.equal(t, u) for t, u in zip(found, expected, strict=True))
    every = dy[:1].expand(m, n)
    found = results(x, w, a, b, magnitude, every, ours)
    check((x, w, a, b, magnitude, every), found)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_only_what_is_wanted(shape):
    x, w, a, b, magnitude, dy = operands(*shape, 16)
    every = dict(zip("xabm", results(x, w, a, b, magnitude, dy, ours)[1:], strict=True))
    for wanted in itertools.product((False, True), repeat=4):
        leaves = dict(zip("xabm", (x, a, b, magnitude), strict=True))
        for key, want in zip("xabm", wanted, strict=True):
            leaves[key] = leaves[key].detach().requires_grad_(want)
        y = ours(leaves["x"], w, leaves["a"], leaves["b"], leaves["m"])
        if any(wanted):
            y.backward(dy)
        for key, want in zip("xabm", wanted, strict=True):
            assert (leaves[key].grad is not None) == want
            if want:
                torch.testing.assert_close(leaves[key].grad, every[key], msg=key)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_in_a_cuda_graph(shape):
    args = operands(*shape, 16)
    x, w, a, b, magnitude, dy = (t.clone() for t in args)
    results(x, w, a, b, magnitude, dy, ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(x, w, a, b, magnitude, dy, ours)
    for tensor in (x, a, b, magnitude, dy):
        tensor.mul_(1.25)
    graph.replay()
    again = results(x, w, a, b, magnitude, dy, ours)
    assert all(torch.equal(t, u) for t, u in zip(found, again, strict=True))


@pytest.mark.parametrize("changed", [False, True])
def test_compiled(changed):
    args = operands(*SHAPES[-1], 16)

    def run(x, w, a, b, magnitude):
        y = ours(x, w, a, b, magnitude)
        return y.mul_(2) if changed else y

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with _library.recorded_kernels() as kernels:
        found = results(*args, compiled)
    assert ("dora_linear", "dora_linear_epilogue") in kernels
    for got, expected in zip(found, results(*args, run), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_and_what_is_composed():
    *args, _ = operands(*SHAPES[2], 16, dtype=torch.float32)
    x, w, *rest = args
    with torch.autocast("cuda", torch.bfloat16), _library.recorded_kernels() as kernels:
        y = ours(*args)
    assert y.dtype is torch.bfloat16
    assert ("dora_linear", served(*SHAPES[2])["dora_linear"]) in kernels
    torch.testing.assert_close(y.double(), plain(*(t.double() for t in args)), atol=0.05, rtol=0.02)
    w.requires_grad_()
    for other, dtype in (
        (args, torch.float32),
        ((x.half(), w.detach().half(), *rest), torch.float16),
    ):
        with _library.recorded_kernels() as kernels:
            assert ours(*other).dtype is dtype
        assert [op for op, _ in kernels] == ["dora_norms", "lora_linear", "adapter_scale"]


def test_slices_of_many_rows():
    args = operands(4100, 136, 4096, 8)
    check(args, results(*args, ours))


@pytest.mark.parametrize("rank", [8, 33])
@pytest.mark.parametrize("shape", [(1000, 520, 4104), (1100, 1032, 2056)], ids=str)
def test_with_the_gemm_for_sm80(shape, rank):
    for by_out in (True, False):
        args = operands(*shape, rank, by_out=by_out)
        with sm80(), _library.recorded_kernels() as kernels:
            found = results(*args, ours)
        names = dict(kernels)
        assert names["dora_linear"] == f"dora_linear_{'epilogue' if by_out else 'columns'}"
        assert names["lora_linear"].startswith("gemm_sm80")
        check(args, found)
