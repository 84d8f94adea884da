# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels of the LoRA linear are launched, with an extension that does on the CPU, through the
pointers and pitches that it is given, what csrc/lora/lora.h says."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from pyfast import _extension, ops
from pyfast.ops import _library, _lora_launch, _philox, _scratch, lora
from pyfast.testing import seeded
from tests.cases import packed

DTYPES = {code: dtype for dtype, code in _extension.DTYPES.items()}
WHY = "torch's GEMM is faster"
K, N, SCALE = 16, 24, 0.75


def at(address, rows, columns, pitch, dtype):
    """The matrix in memory."""
    assert pitch >= columns
    size = ((rows - 1) * pitch + columns) * dtype.itemsize
    cells = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(cells, dtype=dtype).as_strided((rows, columns), (pitch, 1))


class Extension:
    """csrc/lora on the CPU; all that is not LoRA's is the real extension's."""

    lora_counters = 32

    def __init__(self, gemm):
        self.real, self.gemm, self.calls = _extension.C, gemm, []

    def __getattr__(self, name):
        return getattr(self.real, name)

    def lora_gemm_name(self, device, m, n, k, pitch_w, by_out, transposed):
        assert pitch_w >= (k if by_out else n)
        return (self.gemm, "") if self.gemm else ("", WHY)

    def lora_workspace(self, device, m, n, k, r):
        return 256

    def problem(self, args):
        (device, stream, dtype, adapter, m, n, k, r, x, pitch_x, w, pitch_w, by_out, a, b, scale,
         pitch_z, seed, threshold, workspace, counters) = args  # fmt: skip
        assert (device, stream) == (None, 0)
        assert x % 16 == 0
        assert pitch_x % 8 == pitch_z % 8 == 0
        assert workspace - counters == 4 * self.lora_counters
        assert not at(counters, 1, self.lora_counters, self.lora_counters, torch.float32).any()
        at(workspace, 1, 64, 64, torch.float32).fill_(float("nan"))
        x = at(x, m, k, pitch_x, DTYPES[dtype]).double()
        if w:
            shape = (n, k) if by_out else (k, n)
            w = at(w, *shape, pitch_w, DTYPES[dtype]).double()
            w = w if by_out else w.t()
        keep = torch.ones_like(x)
        if seed:
            p = threshold / _philox.LEVELS
            keep = _philox.keep_mask(
                at(seed, 1, 2, 2, torch.int64)[0], m, k, p
            ) * _philox.keep_scale(p)
        a, b = at(a, r, k, k, DTYPES[adapter]).double(), at(b, n, r, r, DTYPES[adapter]).double()
        return x, w, a, b, scale, keep

    def lora_forward(self, *args):
        x, w, a, b, scale, keep = self.problem(args[:21])
        bias, y, z = args[21:]
        dtype, m, n, pitch_z = DTYPES[args[2]], args[4], args[5], args[16]
        low = scale * (x * keep) @ a.t()
        at(z, m, pitch_z, pitch_z, dtype).zero_()[:, : a.shape[0]] = low
        if args[10]:
            shift = at(bias, 1, n, n, dtype).double() if bias else 0
            at(y, m, n, n, dtype).copy_(x @ w.t() + low @ b.t() + shift)
        self.calls.append("forward")
        return self.gemm if args[10] else ""

    def lora_backward(self, *args):
        x, w, a, b, scale, keep = self.problem(args[:21])
        dy, pitch_dy, z, dz, dx, da, db = args[21:]
        dtype, adapter, m, n, k, r = (DTYPES[args[2]], DTYPES[args[3]], *args[4:8])
        assert dy % 16 == 0
        assert pitch_dy % 8 == 0
        dy, low = (
            at(dy, m, n, pitch_dy, dtype).double(),
            scale * at(dy, m, n, pitch_dy, dtype).double() @ b,
        )
        z = at(z, m, r, args[16], dtype).double()
        if dx or da:
            at(dz, m, args[16], args[16], dtype).zero_()[:, :r] = low
        if dx and args[10]:
            at(dx, m, k, k, dtype).copy_(dy @ w + low @ a * keep)
        if da:
            at(da, r, k, k, adapter).copy_(low.t() @ (x * keep))
        if db:
            at(db, n, r, r, adapter).copy_(dy.t() @ z)
        self.calls.append("backward")
        return self.gemm if dx and args[10] else ""


@pytest.fixture(params=["own", "torch"])
def layer(request, monkeypatch):
    """`lora_linear` by the launches for CUDA; the product with W by our kernel or by torch's."""
    extension = Extension("gemm" if request.param == "own" else "")
    monkeypatch.setattr(_extension, "C", extension)
    monkeypatch.setattr(_extension, "has_cuda", lambda: True)
    monkeypatch.setattr(_lora_launch, "raw_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_forward_plan", "_backward_plan"):
        fresh = _library.planned(getattr(lora, name).__wrapped__)
        monkeypatch.setattr(lora, name, fresh)
    monkeypatch.setattr(lora, "_lora_backward", lora._lora_backward_kernel)

    def run(x, w, a, b, *, bias=None, dropout=0.0, seed=None, absmax=None, inner=None, offset=None):
        return lora._LoraLinear.apply(
            lora._lora_kernel, x, w, bias, a, b, SCALE, dropout, seed, absmax, inner, offset, 64
        )[0]

    run.extension = extension
    return run


def exact(x, w, a, b, dy, *, bias=None, dropout=0.0, seed=None):
    """y and the gradients of x, A and B by autograd in float64."""
    x, a, b = (t.detach().double().requires_grad_() for t in (x, a, b))
    low = x
    if dropout:
        keep = _philox.keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout)
        low = x * keep.view(x.shape) * _philox.keep_scale(dropout)
    y = x @ w.double().t() + SCALE * (low @ a.t()) @ b.t()
    y = y if bias is None else y + bias.double()
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy.double())


def operands(m=(5,), r=3, dtype=torch.bfloat16, adapter=torch.float32):
    x = seeded((*m, K), seed=1, dtype=dtype).requires_grad_()
    w = seeded((N, K), seed=2, dtype=dtype, scale=0.25)
    a = seeded((r, K), seed=3, dtype=adapter, scale=0.25).requires_grad_()
    b = seeded((N, r), seed=4, dtype=adapter).requires_grad_()
    return x, w, a, b, seeded((*m, N), seed=5, dtype=dtype)


def check(layer, x, w, a, b, dy, matrix=None, parts=None, **options):
    y = layer(x, w, a, b, **options, **(parts or {}))
    got = (y.detach(), *torch.autograd.grad(y, (x, a, b), dy))
    want = exact(x, w if matrix is None else matrix, a, b, dy, **options)
    for g, e, like in zip(got, want, (dy, x, a, b), strict=True):
        assert (g.shape, g.dtype) == (like.shape, like.dtype)
        assert (g.double() - e).norm() <= 0.01 * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, 8])
def test_types_ranks_dropout_and_bias(layer, rank, dtype):
    seed = torch.tensor([7, 8])
    for adapter, p, biased in itertools.product((dtype, torch.float32), (0.0, 0.25), (False, True)):
        bias = seeded((N,), seed=6, dtype=dtype) if biased else None
        tensors = operands(r=rank, dtype=dtype, adapter=adapter)
        check(layer, *tensors, bias=bias, dropout=p, seed=seed if p else None)


def inputs(columns):
    """bfloat16 [..., columns] in every layout."""
    wide = seeded((9, 2 * columns), seed=7, dtype=torch.bfloat16)
    return {
        "one row": wide[0, :columns].contiguous(),
        "three axes": seeded((2, 3, columns), seed=8, dtype=torch.bfloat16),
        "no rows between": wide[:, :columns],
        "odd start": wide.view(-1)[1 : 1 + 8 * columns].view(8, columns),
        "odd pitch": wide.view(-1)[: 8 * (columns + 1)].view(8, columns + 1)[:, :columns],
        "every other": wide[:, ::2],
        "transposed": seeded((columns, 5), seed=9, dtype=torch.bfloat16).t(),
        "axes exchanged": seeded((3, 2, columns), seed=8, dtype=torch.bfloat16).transpose(0, 1),
        "one row for all": wide[:1, :columns].expand(4, columns),
        "one value for all": wide[:1, :1].expand(4, columns),
    }


@pytest.mark.parametrize("name", list(inputs(K)))
def test_layouts_of_x_and_dy(layer, name):
    x = inputs(K)[name].detach().requires_grad_()
    _, w, a, b, _ = operands()
    check(layer, x, w, a, b, seeded((*x.shape[:-1], N), seed=5, dtype=torch.bfloat16))
    dy = inputs(N)[name]
    x = seeded((*dy.shape[:-1], K), seed=1, dtype=torch.bfloat16).requires_grad_()
    check(layer, x, w, a, b, dy)


def test_layouts_of_the_weight_and_the_factors(layer):
    x, w, a, b, dy = operands()
    wide = seeded((N, 2 * K), seed=7, dtype=torch.bfloat16)
    odd = torch.empty(N * K + 1, dtype=torch.bfloat16)[1:].view(N, K).copy_(w)
    layouts = [
        w.t().contiguous().t(),
        wide[:, :K],
        wide[:, ::2],
        odd,
        wide[:1, :K].expand(N, K),
        wide.t()[:K].t(),
    ]
    for weight in layouts:
        check(layer, x, weight, a, b, dy)
    for other in (t.detach().t().contiguous().t().requires_grad_() for t in (a, b)):
        pair = (other, b) if other.shape == a.shape else (a, other)
        check(layer, x, w, *pair, dy)


@pytest.mark.parametrize("nested", [False, True])
def test_an_nf4_weight(layer, nested):
    x, _, a, b, dy = operands()
    codes, absmax, inner, offset = packed(N, K, "cpu", nested=nested)
    w = ops.nf4_dequantize(
        codes, absmax, (N, K), torch.bfloat16, nested_absmax=inner, nested_offset=offset
    )
    parts = {"absmax": absmax, "inner": inner, "offset": offset}
    check(layer, x, codes, a, b, dy, matrix=w, parts=parts)


def test_every_set_of_wanted_gradients(layer):
    for wanted in itertools.product((False, True), repeat=4):
        x, w, a, b, dy = operands(adapter=torch.bfloat16)
        leaves = [
            t.detach().requires_grad_(want) for t, want in zip((x, w, a, b), wanted, strict=True)
        ]
        y = layer(*leaves)
        if any(wanted):
            y.backward(dy)
        low = x.double() @ a.double().t()
        exact_w = dy.double().t() @ x.double()
        _, dx, da, db = exact(x, w, a, b, dy)
        assert low.shape == (5, 3)
        for leaf, want, e in zip(leaves, wanted, (dx, exact_w, da, db), strict=True):
            assert (leaf.grad is not None) == want
            assert not want or (leaf.grad.double() - e).norm() <= 0.01 * e.norm()


def test_no_rows(layer):
    x, w, a, b, dy = operands(m=(0, 5))
    bias = torch.ones(N, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x, w, a, b, bias=bias)
    assert y.shape == dy.shape
    y.backward(dy)
    assert x.grad.shape == x.shape
    assert not a.grad.any()
    assert not b.grad.any()
    assert layer.extension.calls == []


def test_plans_are_made_once_and_checks_not_skipped(layer, monkeypatch):
    x, w, a, b, dy = operands()
    asked = []
    name = layer.extension.lora_gemm_name
    monkeypatch.setattr(
        layer.extension,
        "lora_gemm_name",
        lambda *args: asked.append(args[-1]) or name(*args),
        False,
    )
    for _ in range(3):
        layer(x, w, a, b).backward(dy)
    assert asked == [False, True]
    with pytest.raises(ValueError, match=r"lora_A must have shape \[3, 16\], got \[3, 8\]"):
        layer(x, w, a[:, :8], b)
    with pytest.raises(TypeError, match="weight must be bfloat16, got float32"):
        layer(x, w.float(), a, b)
    with pytest.raises(ValueError, match="dropout must be in"):
        layer(x, w, a, b, dropout=2.0)


def test_what_serves_is_recorded_with_the_reason(layer):
    x, w, a, b, dy = operands()
    with ops.recorded_kernels() as ran:
        layer(x, w, a, b).backward(dy)
        odd = torch.empty(N * K + 1, dtype=torch.bfloat16)[1:].view(N, K).copy_(w)
        layer(x, odd, a, b)
    names = [name for op, name in ran if op.startswith("lora")]
    own = bool(layer.extension.gemm)
    assert names[:2] == (["gemm"] * 2 if own else [f"lora_linear_skinny ({WHY})"] * 2)
    assert names[2] == "lora_linear_skinny (the weight does not begin on 16 bytes)"


def test_what_the_kernels_do_not_take_is_composed(layer):
    x, w, a, b, dy = operands(dtype=torch.float32)
    with ops.recorded_kernels() as ran:
        check(layer, x, w, a, b, dy)
    assert [name for _, name in ran] == ["reference"] * 2
    assert layer.extension.calls == []


def test_workspaces_grow_and_stay_zero_ahead(monkeypatch):
    like = torch.zeros(1)
    monkeypatch.setattr(_scratch, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first = _scratch.workspace(like, 0, 100, 16)
    assert not first[:16].any()
    first[16:].fill_(255)
    assert _scratch.workspace(like, 0, 90, 16) is first
    assert _scratch.workspace(like, 1, 90, 16) is not first
    larger = _scratch.workspace(like, 0, 200, 16)
    assert larger.numel() == 200
    assert not larger[:16].any()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [_scratch.workspace(like, 0, 50, 16) for _ in range(2)]
    assert captured[0] is not captured[1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _scratch.workspace(like, 0, 50, 16) is larger


def test_gemms_take_whole_devices_only_where_no_peer_is_waited_for(monkeypatch):
    told = []

    class Told:
        lora_allow_making = staticmethod(told.append)

    monkeypatch.setattr(_extension, "C", Told())
    monkeypatch.setattr(_lora_launch, "_alone", True)
    for initialized, size in ((False, 1), (True, 1), (True, 2), (True, 2), (False, 2)):
        state = {"is_initialized": initialized, "get_world_size": size}
        for name, value in state.items():
            monkeypatch.setattr(_lora_launch.distributed, name, lambda value=value: value)
        _lora_launch._share_device()
    assert told == [False, True]
