# SPDX-License-Identifier: Apache-2.0
"""scaled_linear against plain torch, and how its GEMM is launched: by an extension that does on the CPU,
through the pointers and pitches that it is given, what csrc/adapter/scaled_gemm.h says."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pyfast import _extension, ops
from pyfast.errors import UnsupportedError
from pyfast.ops import _adapter_launch, _library
from pyfast.testing import assert_accurate, seeded
from tests.ops.lora_extension import DTYPES, at, inputs

F = torch.nn.functional
scaled_linear = importlib.import_module("pyfast.ops.scaled_linear")  # the function has its name
DTYPES_OF_X = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, K = 8, 16


def plain(x, weight, scale, bias=None):
    return F.linear(x * scale.to(x.dtype), weight, bias)


def tensors(shape, n, dtype, device="cpu", bias=True, kind=None):
    k = shape[-1]
    x, dy = (
        seeded(s, seed=i, dtype=dtype, device=device)
        for i, s in ((1, shape), (2, (*shape[:-1], n)))
    )
    w = seeded((n, k), seed=3, dtype=dtype, device=device, scale=k**-0.5)
    scale = 1 + seeded((k,), seed=4, dtype=kind or dtype, device=device, scale=0.3)
    leaves = [x, scale, seeded((n,), seed=5, dtype=dtype, device=device)][: 2 + bias]
    return [leaf.detach().requires_grad_() for leaf in leaves], w, dy


def grads(function, leaves, w, dy, dtype=None):
    if dtype is not None:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        w, dy = w.to(dtype), dy.to(dtype)
    x, scale, *bias = leaves
    y = function(x, w, scale, *bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("kind", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES_OF_X, ids=str)
@pytest.mark.parametrize("shape", [(0, 50), (1, 50), (50,), (129, 50), (3, 5, 50)], ids=str)
def test_is_as_near_to_float64_as_torch(shape, dtype, kind, device):
    made = tensors(shape, 33, dtype, device, kind=kind)
    exact = grads(plain, *made, dtype=torch.float64)
    for got, rough, true, like in zip(
        grads(ops.scaled_linear, *made),
        grads(plain, *made),
        exact,
        [made[1], *made[0]],
        strict=True,
    ):
        assert got.dtype == like.dtype
        assert_accurate(got, rough, true)


def test_what_is_not_finite_goes_where_torch_lets_it_go(device):
    (x, scale, bias), w, dy = tensors((40, 12), 8, torch.float32, device)
    for tensor, value in itertools.product((x, scale, bias, w, dy), ("nan", "inf", "-inf")):
        bad = tensor.detach().clone()
        bad.view(-1)[3] = float(value)
        leaves, (weight, grad) = (
            [bad if t is tensor else t.detach() for t in group]
            for group in ((x, scale, bias), (w, dy))
        )
        leaves = [leaf.requires_grad_() for leaf in leaves]
        for got, want in zip(
            grads(ops.scaled_linear, leaves, weight, grad),
            grads(plain, leaves, weight, grad),
            strict=True,
        ):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_a_weight_that_is_trained_has_its_gradient(device):
    (x, scale, bias), w, dy = tensors((5, 12), 8, torch.float32, device)
    leaves = [x, scale, bias, w.requires_grad_()]
    got, want = (
        torch.autograd.grad(function(x, w, scale, bias), leaves, dy)
        for function in (ops.scaled_linear, plain)
    )
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e)
    with pytest.raises(UnsupportedError, match="scaled_linear: the weight wants a gradient"):
        ops.OPS["scaled_linear"].call(x, w, scale, bias)


@pytest.mark.parametrize(
    "kinds", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)), ids=str
)
def test_autocast(kinds, device):
    (x, scale, bias), w, _ = tensors((5, 12), 8, torch.float32, device)
    x, w = (t.detach().to(kind) for t, kind in zip((x, w), kinds, strict=True))
    leaves = [x.requires_grad_(), scale, bias]
    results = []
    for function in (
        ops.scaled_linear, lambda x, w, s, b: F.linear(ops.adapter_scale(x, s), w, b)
    ):  # fmt: skip
        with torch.autocast(device, torch.bfloat16):
            y = function(x, w, scale, bias)
        assert y.dtype is torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(
            got.float(), want.float(), rtol=0.02, atol=0.02 * want.abs().max().item()
        )


def test_used_twice_and_checkpointed(device):
    (x, scale, bias), w, dy = tensors((5, 12), 12, torch.float32, device)

    def twice(function):
        return lambda x, w, s, b: function(function(x, w, s, b), w, s, b)

    want = grads(twice(plain), [x, scale, bias], w, dy)
    ours = twice(ops.scaled_linear)
    kept = [ours, lambda *args: checkpoint(ours, *args, use_reentrant=False)]
    for function in kept:
        for got, true in zip(grads(function, [x, scale, bias], w, dy), want, strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_make_no_product_more_than_a_compositions(reentrant):
    (x, scale, bias), w, _ = tensors((40, 12), 8, torch.float32)
    counted = []
    for function in (ops.scaled_linear, lambda x, w, s, b: F.linear(ops.adapter_scale(x, s), w, b)):
        with FlopCounterMode(display=False) as flops:
            checkpoint(function, x, w, scale, bias, use_reentrant=reentrant).sum().backward()
        counted.append(flops.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_the_dtypes_of_x_and_weight_must_agree():
    (x, scale, bias), w, _ = tensors((4, 12), 8, torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"x is bfloat16 and weight float32\. Fix: cast x to float32"
    ):
        ops.scaled_linear(x, w.float(), scale, bias)


def test_only_the_input_is_kept_for_the_backward():
    (x, scale, bias), w, _ = tensors((40, 12), 8, torch.float32)
    y = ops.scaled_linear(x, w, scale, bias)
    kept = y.grad_fn.saved_tensors
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, w, scale)}


def test_error_texts():
    x, w, scale = torch.zeros(2, 16), torch.zeros(4, 16), torch.ones(16)
    for args, text in (
        ((x, torch.zeros(4, 15), scale), r"weight must have shape \[4, 16\], got \[4, 15\]"),
        ((x, w, scale[:3]), r"scale must have shape \[16\], got \[3\]"),
        ((x, w, scale, scale), r"bias must have shape \[4\], got \[16\]"),
        ((x, w.to("meta"), scale), "weight is on meta"),
    ):
        with pytest.raises(ValueError, match=f"scaled_linear: {text}"):
            ops.scaled_linear(*args)


# --- launches -----------------------------------------------------------------------------------


class Extension:
    """The kernels on the CPU; the rest is the real extension's."""

    lora_counters = 32

    def __init__(self, reason=""):
        self.reason = reason

    def __getattr__(self, name):
        return getattr(_extension._module, name)

    def adapter_scale_workspace(self, device, rows, cols):
        return 256

    def adapter_scale_backward(
        self, device, stream, kind, scale_kind, m, k, dy, pitch_dy, x, pitch_x, scale, parts, dx, ds
    ):  # fmt: skip
        """The product alone: x for dy."""
        assert (device, stream, x, pitch_x, parts, ds) == (None, 0, dy, pitch_dy, 0, 0)
        assert not any(p % 16 for p in (dy, dx))
        assert pitch_dy % 8 == k % 8 == 0
        half = DTYPES[kind]
        factors = at(scale, 1, k, k, DTYPES[scale_kind]).float()
        at(dx, m, k, k, half).copy_(at(dy, m, k, pitch_dy, half).float() * factors)
        return "adapter_scale_backward_cuda"

    def scaled_linear_missing(self, device, m, n, k):
        return self.reason

    def scaled_linear_workspace(self, m, k):
        return 256

    def scaled_linear_backward(
        self,
        device,
        stream,
        kind,
        m,
        n,
        k,
        dy,
        pitch_dy,
        w,
        pitch_w,
        x,
        pitch_x,
        scale,
        parts,
        dx,
        ds,
    ):
        assert (device, stream) == (None, 0)
        assert not any(p % 16 for p in (dy, w, x, dx, parts))
        assert not any(p % 8 for p in (pitch_dy, pitch_w, pitch_x))
        at(parts, 1, 64, 64, torch.float32).fill_(float("nan"))
        half = torch.bfloat16
        product = at(dy, m, n, pitch_dy, half).double() @ at(w, n, k, pitch_w, half).double()
        factors = at(scale, 1, k, k, torch.float32).double()
        if ds:
            at(ds, 1, k, k, DTYPES[kind])[0] = (product * at(x, m, k, pitch_x, half).double()).sum(
                0
            )
        at(dx, m, k, k, half).copy_(product * factors)
        return "kernels"


def by_launches(monkeypatch, reason=""):
    """`scaled_linear` by the launches for CUDA, and the names of what served its two directions."""
    monkeypatch.setattr(_extension, "C", Extension(reason))
    monkeypatch.setattr(_extension, "has_cuda", lambda: True)
    for module in (scaled_linear, _adapter_launch):
        monkeypatch.setattr(module, "raw_stream", lambda device: 0)
    fresh = _library.planned(_adapter_launch.scale_plan.__wrapped__)
    monkeypatch.setattr(_adapter_launch, "scale_plan", fresh)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_scales_weight", "_backward_plan"):
        fresh = _library.planned(getattr(scaled_linear, name).__wrapped__)
        monkeypatch.setattr(scaled_linear, name, fresh)
    monkeypatch.setattr(scaled_linear, "_backward", scaled_linear._backward_kernel)

    def run(x, w, scale, bias=None):
        return scaled_linear._ScaledLinear.apply(scaled_linear._linear_kernel, x, w, scale, bias)

    return run


def check(run, leaves, w, dy, names):
    with ops.recorded_kernels() as ran:
        got = grads(run, leaves, w, dy)
    assert [kernel for op, kernel in ran if op.startswith("scaled")] == names
    exact = grads(plain, leaves, w, dy, dtype=torch.float64)
    for g, e, like in zip(got, exact, [dy, *leaves], strict=True):
        assert (g.shape, g.dtype) == (e.shape, like.dtype)
        assert (g.double() - e).norm() <= 0.02 * e.norm() + 1e-9


GEMM, WEIGHT, INPUT = "kernels", "scaled_linear_weight", "scaled_linear_input"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(inputs(K)))
def test_layouts(name, kind, monkeypatch):
    run, x = by_launches(monkeypatch), inputs(K)[name]
    rows = x.numel() // K
    first = WEIGHT if rows > N else INPUT
    leaves, w, dy = tensors(x.shape, N, torch.bfloat16, kind=kind)
    check(run, [x.detach().requires_grad_(), *leaves[1:]], w, dy, [first, GEMM])
    wide = torch.full((*dy.shape[:-1], 3 * N), float("nan"), dtype=dy.dtype)
    wide[..., N : 2 * N] = dy
    pitched = torch.zeros(N, K + 8, dtype=dy.dtype)
    pitched[:, :K] = w
    for grad in (wide[..., N : 2 * N], dy[..., :1].expand_as(dy)):
        check(run, leaves, pitched[:, :K], grad, [first, GEMM])


@pytest.mark.parametrize("rows", [3, N, N + 1, 40])
def test_the_smaller_of_weight_and_input_is_scaled(rows, monkeypatch):
    run = by_launches(monkeypatch)
    made = tensors((rows, K), N, torch.bfloat16)
    check(run, *made, [WEIGHT if rows > N else INPUT, GEMM])
    halves = tensors((rows, K), N, torch.float16)
    reason = "scaled_linear_backward_torch (the GEMM is for bfloat16, not torch.float16)"
    check(run, *halves, [INPUT, reason])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.t().contiguous().t(), "the weight must be stored by out feature"),
        (lambda w: torch.cat([w[:, :1], w], 1)[:, 1:], "the weight must be stored by out feature"),
        (lambda w: w, "few tiles"),
    ],
    ids=["by-in", "odd", "small"],
)
def test_what_the_gemm_does_not_serve_is_composed(change, reason, monkeypatch):
    run = by_launches(monkeypatch, reason="few tiles" if reason == "few tiles" else "")
    leaves, w, dy = tensors((20, K), N, torch.bfloat16)
    with ops.recorded_kernels() as ran:
        got = grads(run, leaves, change(w), dy)
    assert any(kernel.startswith(f"scaled_linear_backward_torch ({reason}") for _, kernel in ran)
    for g, e in zip(got, grads(plain, leaves, w, dy, dtype=torch.float64), strict=True):
        assert (g.double() - e).norm() <= 0.02 * e.norm()


def test_every_set_of_wanted_gradients(monkeypatch):
    run = by_launches(monkeypatch)
    leaves, w, dy = tensors((20, K), N, torch.bfloat16)
    every = grads(run, leaves, w, dy)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        x, scale, bias = leaves
        y = run(x, w, scale, bias)
        assert y.requires_grad == any(wanted)
        chosen = list(itertools.compress(leaves, wanted))
        found = torch.autograd.grad(y, chosen, dy) if chosen else ()
        for got, want in zip(found, itertools.compress(every, wanted), strict=True):
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
