# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels of the LoRA linear are launched, see `lora_extension`."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import _extension, ops
from pyfast.ops import (
    _accumulate,
    _alone,
    _lora_launch,
    _nf4_gemm,
    _philox,
    _remake,
    _scratch,
    lora,
)
from pyfast.testing import seeded
from tests.cases import packed
from tests.ops.lora_extension import WHY, Extension, inputs, use

K, N, SCALE = 16, 24, 0.75


@pytest.fixture(params=["own", "own, makes", "torch"])
def layer(request, monkeypatch):
    """`lora_linear` by the launches for CUDA, with our kernel for W, which may make z, or torch's."""
    extension = Extension("gemm" if "own" in request.param else "", "makes" in request.param)
    use(extension, lora, _lora_launch, monkeypatch)
    monkeypatch.setattr(_lora_launch, "MANY_ROWS", 2)
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
@pytest.mark.parametrize("rank", [3, 8, 20, 24])
def test_types_ranks_dropout_and_bias(layer, rank, dtype):
    seed = torch.tensor([7, 8])
    for adapter, p, biased in itertools.product((dtype, torch.float32), (0.0, 0.25), (False, True)):
        bias = seeded((N,), seed=6, dtype=dtype) if biased else None
        tensors = operands(r=rank, dtype=dtype, adapter=adapter)
        check(layer, *tensors, bias=bias, dropout=p, seed=seed if p else None)


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


def test_layouts_of_the_bias(layer):
    x, w, a, b, dy = operands()
    wide = seeded((2 * N + 1,), seed=7, dtype=torch.bfloat16)
    for bias in (wide[: 2 * N : 2], wide[:1].expand(N), wide[1 : N + 1]):
        check(layer, x, w, a, b, dy, bias=bias)


@pytest.mark.parametrize("nested", [False, True])
def test_an_nf4_weight(layer, nested):
    x, _, a, b, dy = operands()
    codes, absmax, inner, offset = packed(N, K, "cpu", nested=nested)
    w = ops.nf4_dequantize(
        codes, absmax, (N, K), torch.bfloat16, nested_absmax=inner, nested_offset=offset
    )
    parts = {"absmax": absmax, "inner": inner, "offset": offset}
    check(layer, x, codes, a, b, dy, matrix=w, parts=parts)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rank", [3, 8, 24])
@pytest.mark.parametrize("nested", [False, True])
def test_many_rows_of_an_nf4_weight(layer, monkeypatch, nested, rank, dropout):
    """Its bytes are multiplied, with z and B, or dz and A; dx under dropout takes the dense weight."""
    k = 128
    monkeypatch.setattr(_nf4_gemm, "is_faster", lambda *shape: True)
    codes, absmax, inner, offset = packed(N, k, "cpu", nested=nested)
    w = ops.nf4_dequantize(
        codes, absmax, (N, k), torch.bfloat16, nested_absmax=inner, nested_offset=offset
    )
    x = seeded((300, k), seed=1, dtype=torch.bfloat16).requires_grad_()
    a = seeded((rank, k), seed=3, scale=0.25).requires_grad_()
    b = seeded((N, rank), seed=4).requires_grad_()
    dy = seeded((300, N), seed=5, dtype=torch.bfloat16)
    parts = {"absmax": absmax, "inner": inner, "offset": offset}
    options = {"dropout": dropout, "seed": torch.tensor([7, 8]) if dropout else None}
    options["bias"] = seeded((N,), seed=6, dtype=torch.bfloat16)
    check(layer, x, codes, a, b, dy, matrix=w, parts=parts, **options)
    assert layer.extension.calls.count("nf4_gemm") == (1 if dropout else 2)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rank", [3, 24])
def test_every_set_of_wanted_gradients(layer, rank, dropout):
    """What none of them reads is not handed to the kernels."""
    options = {"dropout": dropout, "seed": torch.tensor([7, 8]) if dropout else None}
    for wanted in itertools.product((False, True), repeat=4):
        x, w, a, b, dy = operands(r=rank, adapter=torch.bfloat16)
        leaves = [
            t.detach().requires_grad_(want) for t, want in zip((x, w, a, b), wanted, strict=True)
        ]
        y = layer(*leaves, **options)
        if any(wanted):
            y.backward(dy)
        exact_w = dy.double().t() @ x.double()
        _, dx, da, db = exact(x, w, a, b, dy, **options)
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
    with pytest.raises(TypeError, match="x is bfloat16 and weight float32"):
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


def test_many_ranks_are_torch_s_where_torch_makes_the_product_with_w(layer):
    x, w, a, b, dy = operands(r=24)
    with ops.recorded_kernels() as ran:
        layer(x, w, a, b).backward(dy)
    own = bool(layer.extension.gemm)
    names = [name for op, name in ran if op.startswith("lora")]
    assert names == (["gemm"] * 2 if own else ["lora_linear_torch"] * 2)
    assert layer.extension.calls == (["forward", "backward"] if own else [])


@pytest.mark.parametrize("rank", [3, 24])
def test_dropout_of_dx_is_composed_where_the_gemm_is_for_sm_80(layer, rank):
    layer.extension.gemm, layer.extension.makes = "gemm_sm80_128x256", False
    tensors = operands(r=rank)
    with ops.recorded_kernels() as ran:
        check(layer, *tensors)
        check(layer, *tensors, dropout=0.25, seed=torch.tensor([7, 8]))
    names = [name for op, name in ran if op.startswith("lora")]
    assert names[:3] == [layer.extension.gemm] * 3
    assert names[3:] == ["lora_linear_skinny (the GEMM for sm_80 has no dropout)"]


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
    monkeypatch.setattr(_alone, "_alone", True)
    for initialized, size in ((False, 1), (True, 1), (True, 2), (True, 2), (False, 2)):
        state = {"is_initialized": initialized, "get_world_size": size}
        for name, value in state.items():
            monkeypatch.setattr(_alone.distributed, name, lambda value=value: value)
        _alone.share_device()
    assert told == [False, True]


@pytest.mark.parametrize("rank", [8, 24])
def test_gradients_that_are_added_to_those_there(layer, rank):
    x, w, a, b, dy = operands(r=rank)
    for factor in (a, b):
        _accumulate.mark(factor, True)
    layer(x, w, a, b).backward(dy)
    held = [factor.grad for factor in (a, b)]
    other = seeded((5, K), seed=11, dtype=torch.bfloat16).requires_grad_()
    layer(other, w, a, b).backward(dy)
    parts = [exact(each, w, a, b, dy)[2:] for each in (x, other)]
    for factor, first, *wants in zip((a, b), held, *parts, strict=True):
        assert factor.grad is first
        assert (first.double() - sum(wants)).norm() <= 0.01 * sum(wants).norm()


def test_hooks_of_the_accumulating_nodes_find_the_gradients_there_and_are_given_none(layer):
    x, w, a, b, dy = operands(r=8)
    seen = []

    def hook(factor):
        return lambda _, grads: seen.append((grads, factor.grad is not None))

    nodes = []  # kept: a factor's next use would make another
    for factor in (a, b):
        _accumulate.mark(factor, True)
        nodes.append(factor.expand_as(factor).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(hook(factor))
    layer(x, w, a, b).backward(dy)
    assert seen == [((None,), True)] * 2


@pytest.mark.parametrize(("rank", "dropout"), [(8, 0.0), (8, 0.25), (24, 0.0)])
def test_dx_in_the_place_of_an_input_that_was_made_again(layer, rank, dropout, monkeypatch):
    monkeypatch.setattr(_remake, "LEAST", 1)
    _, w, a, b, dy = operands(r=rank)
    seed = torch.tensor([7, 8])
    gate, up = (seeded((5, K), seed=i, dtype=torch.bfloat16).requires_grad_() for i in (1, 2))
    options = {"dropout": dropout, "seed": seed if dropout else None}
    y = layer(gate * up, w, a, b, **options)
    assert y.grad_fn.saved_tensors[0] is None
    grads = torch.autograd.grad(y, (gate, up, a, b), dy)
    made = exact((gate * up).detach(), w, a, b, dy, **options)[1:]
    wants = (made[0] * up.double(), made[0] * gate.double(), *made[1:])
    for got, want in zip(grads, wants, strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm()
    extension = layer.extension
    assert extension.over_x is (extension.makes and rank == 8 and dropout == 0.0)
