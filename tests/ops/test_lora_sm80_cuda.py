# SPDX-License-Identifier: Apache-2.0
"""The GEMM of the LoRA linear for sm_80: that it serves where it is to, and how near it is to float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from pyfast import _extension, ops
from pyfast.ops import _library, _philox, lora
from pyfast.testing import seeded
from tests.cases import packed
from tests.ops import test_lora_cuda as single
from tests.ops import test_lora_group_cuda as group
from tests.ops.test_lora_cuda import HALVES, SCALE

pytestmark = pytest.mark.gpu

KERNELS = ("gemm_sm80_128x256", "gemm_sm80_128x128")
# Rows, in and out features.
SHAPES = [(1, 8, 8), (130, 1024, 1032), (513, 136, 8), (1000, 4104, 520), (257, 40, 264)]
RANKS = (0, 1, 8, 16, 100, 256)
SERVED = [(130, 512, 136), (1, 64, 64), (1100, 1032, 4104), (2050, 520, 1032), (4096, 1024, 1024)]
GROUPS = [
    # Rows, in features, out features, ranks.
    (130, 512, (136, 264), (16, 5)),
    (2050, 1032, (2072, 520, 392), (16, 3, 100)),
    (2050, 1032, (520, 392), (8, 200)),
]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """As on a GPU of compute capability 8.x, with plans of its own."""
    for module in (lora, importlib.import_module("pyfast.ops.lora_group")):
        for name in ("_forward_plan", "_backward_plan"):
            made = _library.planned(getattr(module, name).__wrapped__)
            monkeypatch.setattr(module, name, made)
    _extension.C.lora_force_sm(80)
    yield
    _extension.C.lora_force_sm(0)


def served(ran):
    """The kernels of the products with W, once each."""
    return {name for op, name in ran if op.startswith("lora")}


def error(got, expected):
    return (got.double() - expected).abs()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by_out", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_is_as_near_to_float64_as_torch(kernel, shape, by_out, dtype):
    m, k, n = shape
    index = _extension.C.lora_gemm_kernels().index(kernel)
    stream = _extension.stream(torch.cuda.current_device())
    for r, biased, swizzle in itertools.product(RANKS, (False, True), (1, 8)):
        pitch = (r + 7) // 8 * 8
        x = seeded((m, k), seed=1, dtype=dtype, device="cuda")
        w = seeded((n, k), seed=2, dtype=dtype, device="cuda", scale=k**-0.5)
        z = seeded((m, pitch), seed=3, dtype=dtype, device="cuda")
        b = seeded((n, pitch), seed=4, dtype=dtype, device="cuda", scale=max(r, 1) ** -0.5)
        z[:, r:] = b[:, r:] = 0
        # The first of a view may lie on two bytes.
        bias = seeded((n + 1,), seed=5, dtype=dtype, device="cuda")[1:] if biased else None
        lies = (w, b) if by_out else (w.t().contiguous(), b[:, :r].t().contiguous())
        y = torch.full((m + 1, n), float("nan"), dtype=dtype, device="cuda")
        _extension.C.lora_gemm(
            0, stream, _extension.DTYPES[dtype], by_out, m, n, k, r, x.data_ptr(),
            lies[0].data_ptr(), z.data_ptr(), lies[1].data_ptr(), pitch, _extension.ptr(bias),
            y.data_ptr(), index, swizzle, False, 0, 0, 0, 0,
        )  # fmt: skip
        shift = bias if biased else torch.zeros(n, dtype=dtype, device="cuda")
        expected = x.double() @ w.double().t() + z.double() @ b.double().t() + shift.double()
        ours = error(y[:m], expected)
        theirs = error(torch.nn.functional.linear(x, w, shift) + z @ b.t(), expected)
        rounding = expected.abs().max() * 1e-6
        mean, most = (1.1, 2.0) if expected.numel() >= 10_000 else (3.0, 4.0)
        assert ours.square().mean().sqrt() <= mean * theirs.square().mean().sqrt() + rounding
        assert ours.max() <= most * theirs.max() + rounding
        assert y[m].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SERVED, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 100, 256])
def test_serves_both_directions(shape, rank, dtype):
    for adapter_dtype, by_out in itertools.product((dtype, torch.float32), (True, False)):
        x, w, a, b, dy = single.operands(*shape, rank, dtype, adapter_dtype, by_out)
        with ops.recorded_kernels() as ran:
            y = ops.lora_linear(x, w, a, b, scale=SCALE)
            y.backward(dy)
        assert served(ran) <= set(KERNELS), ran
        got = y.detach(), x.grad, a.grad, b.grad
        expected, plain = single.exact(x, w, a, b, dy), single.composed(x, w, a, b, dy)
        single.check(got, expected, plain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("members", GROUPS, ids=str)
def test_serves_groups(members, dtype):
    for adapter_dtype, biases in itertools.product((dtype, torch.float32), (False, True)):
        ran = group.check(*group.operands(members, dtype, adapter_dtype, biases))
        assert served(ran) <= set(KERNELS), ran


def test_serves_nf4_weights():
    m, k, n, dtype = 1100, 1024, 4096, torch.bfloat16
    x, _, a, b, dy = single.operands(m, k, n, 16, dtype, torch.float32, True)
    codes, absmax, inner, offset = packed(n, k, "cuda", nested=True)
    parts = {"nested_absmax": inner, "nested_offset": offset}
    w = ops.nf4_dequantize(codes, absmax, (n, k), dtype, **parts)
    with ops.recorded_kernels() as ran:
        y = ops.lora_linear(x, codes, a, b, scale=SCALE, absmax=absmax, **parts)
        y.backward(dy)
    assert served(ran) <= set(KERNELS), ran
    got = y.detach(), x.grad, a.grad, b.grad
    single.check(got, single.exact(x, w, a, b, dy), single.composed(x, w, a, b, dy))


@pytest.mark.parametrize("rank", [16, 128])
def test_dropout_of_dx_is_composed_and_says_so(rank, monkeypatch):
    (m, k, n), p, dtype = (1100, 1032, 4104), 0.25, torch.bfloat16
    seed = torch.tensor([5, 9 << 33], device="cuda")
    monkeypatch.setattr(_philox, "new_seed", lambda device: seed)
    mask = (_philox.keep_mask(seed, m, k, p) * _philox.keep_scale(p)).double()
    x, w, a, b, dy = single.operands(m, k, n, rank, dtype, dtype, True)
    with ops.recorded_kernels() as ran:
        y = ops.lora_linear(x, w, a, b, scale=SCALE, dropout=p)
        y.backward(dy)
    names = [name for op, name in ran if op.startswith("lora")]
    assert names[0] in KERNELS
    assert names[1:] == ["lora_linear_skinny (the GEMM for sm_80 has no dropout)"]
    got = y.detach(), x.grad, a.grad, b.grad
    plain = single.composed(x, w, a, b, dy, mask.to(dtype))
    single.check(got, single.exact(x, w, a, b, dy, mask), plain)


def test_small_products_go_through_torch():
    x, w, a, b, dy = single.operands(16, 1024, 1024, 8, HALVES[0], HALVES[0], True)
    with ops.recorded_kernels() as ran:
        ops.lora_linear(x, w, a, b, scale=SCALE).backward(dy)
    why = "torch's GEMM is faster for 16 rows, 1024 to 1024 features"
    assert served(ran) == {f"lora_linear_skinny ({why})"}


def test_results_repeat_and_a_replayed_graph_gives_them():
    x, w, a, b, dy = single.operands(2048, 1024, 2048, 16, HALVES[0], torch.float32, True)

    def step():
        y = ops.lora_linear(x, w, a, b, scale=SCALE)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]

    first = step()
    for _ in range(3):
        assert all(map(torch.equal, step(), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for each in captured:
        each.zero_()
    graph.replay()
    assert all(map(torch.equal, captured, first))
