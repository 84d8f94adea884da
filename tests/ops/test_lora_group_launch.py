# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels behind `lora_group` are launched, see `lora_extension`."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from pyfast import ops
from pyfast.ops import _accumulate, _lora_group_fused, _lora_group_launch, _lora_group_plan
from pyfast.testing import seeded
from tests.cases import packed
from tests.ops import lora_extension
from tests.ops.lora_extension import DTYPES, at, inputs, put, use

group = importlib.import_module("pyfast.ops.lora_group")
K, OUT, SCALE = 16, (24, 8, 40), 0.75


class Extension(lora_extension.Extension):
    """For whole groups; without W, as the group calls it where torch makes the products with W: what lies
    between the columns of z and dz belongs to others."""

    def lora_group_gemm_name(self, device, m, k, shapes, transposed):
        assert all(pitch >= k for _, _, pitch in shapes)
        return (self.gemm, "") if self.gemm else ("", lora_extension.WHY)

    def lora_group_workspace(self, device, m, k, shapes):
        return 256

    def lora_group_makes(self, device, m, k, shapes, transposed):
        return self.makes

    def group(self, args):
        """x, if it is given, z, the scale and the members of a call for a whole group."""
        (device, stream, dtype, adapter, m, k, x, pitch_x, scale, z, pitch_z, given, workspace, counters,
         members) = args  # fmt: skip
        assert (device, stream) == (None, 0)
        assert workspace - counters == 4 * self.lora_counters
        dtype, adapter = DTYPES[dtype], DTYPES[adapter]
        x = at(x, m, k, pitch_x, dtype).double() if x else None
        z = at(z, m, pitch_z, pitch_z, dtype)
        found = []
        for n, r, first, w, pitch_w, a, b, *rest in members:
            assert first % 8 == 0
            w, a = at(w, n, k, pitch_w, dtype).double(), at(a, r, k, k, adapter).double()
            found.append((n, r, first, w, a, at(b, n, r, r, adapter).double(), rest))
        self.calls.append("group")
        return x, z, scale, given, dtype, adapter, found

    def lora_group_forward(self, *args):
        x, z, scale, given, dtype, _, members = self.group(args)
        if not given:
            z.zero_()
        for n, r, first, w, a, b, (bias, _, y, *_) in members:
            z_mr = z[:, first : first + r]
            if not given:
                z_mr.copy_(scale * x @ a.t())
            shift = at(bias, 1, n, n, dtype).double() if bias else 0
            at(y, len(x), n, n, dtype).copy_(x @ w.t() + z_mr.double() @ b.t() + shift)
        return self.gemm

    def lora_group_backward(self, *args):
        x, z, scale, given, dtype, adapter, members = self.group(args[:15])
        dz, dx = args[15:]
        m, k = args[4:6]
        lies = [0, *itertools.accumulate((r + 7) // 8 * 8 for _, r, *_ in members)]
        dz = at(dz, m, lies[-1], lies[-1], dtype)
        if not given:
            dz.fill_(float("nan"))
        sum_x = 0
        for (n, r, first, w, a, b, rest), begin in zip(members, lies, strict=False):
            dy, pitch, da, db, add_da, add_db = rest
            dy, dz_mr = at(dy, m, n, pitch, dtype).double(), dz[:, begin : begin + r]
            if not given and (dx or da):
                dz[:, begin : begin + (r + 7) // 8 * 8].zero_()
                dz_mr.copy_(scale * dy @ b)
            if da:
                put(at(da, r, k, k, adapter), dz_mr.double().t() @ x, add_da)
            if db:
                z_mr = z[:, first : first + r].double()
                put(at(db, n, r, r, adapter), dy.t() @ z_mr, add_db)
            sum_x = sum_x + dy @ w + dz_mr.double() @ a
        if dx:
            assert dz.isfinite().all()
            at(dx, m, k, k, dtype).copy_(sum_x)
        return self.gemm if dx else ""

    def lora_forward(self, *args):
        assert args[10] == 0
        assert args[21:23] == (0, 0)
        return super().lora_forward(*args)

    def lora_backward(self, *args):
        _, w, _, b, scale, _ = self.problem(args[:21])
        dy, pitch_dy, z, dz, dx, da, db, *adds = args[21:]
        assert adds == [False, False]
        dtype, adapter, m, n, _, r, pitch = (DTYPES[args[2]], DTYPES[args[3]], *args[4:8], args[16])
        assert w == 0
        assert da == 0
        assert dy % 16 == z % 16 == dz % 16 == 0
        dy = at(dy, m, n, pitch_dy, dtype).double()
        if dx:
            at(dz, m, (r + 7) // 8 * 8, pitch, dtype).zero_()[:, :r] = scale * dy @ b
        if db:
            at(db, n, r, r, adapter).copy_(dy.t() @ at(z, m, r, pitch, dtype).double())
        self.calls.append("backward")
        return ""


@pytest.fixture(params=[("", False), ("our GEMM", False), ("our GEMM", True)], ids=str)
def layers(request, monkeypatch):
    """`lora_group` by the launches for CUDA: with torch's GEMMs, with ours, with ours that make Z and dz."""
    extension = Extension(*request.param)
    use(extension, group, _lora_group_launch, monkeypatch)
    monkeypatch.setattr(_lora_group_fused, "raw_stream", lambda device: 0)
    for module in (_lora_group_plan, _lora_group_fused):
        monkeypatch.setattr(module, "MANY_ROWS", 2)
    monkeypatch.setattr(group, "_group_backward", group._backward_kernel)

    def run(x, w, a, b, t, scale=SCALE, nf4=()):
        full = [None] * (3 - len(w))
        parts = [[*each, *full] for each in zip(*nf4, strict=True)] or [[None] * 3] * 3
        scales = [scale] * len(w) if isinstance(scale, float) else scale
        args = (
            x,
            *w,
            *full,
            *t,
            *full,
            *a,
            *full,
            *b,
            *full,
            *parts[0],
            *parts[1],
            *parts[2],
            scales,
            64,
        )
        return group._LoraGroup.apply(group._group_kernel, *args)[: len(w)]

    run.extension = extension
    return run


def operands(m=(5,), ranks=(3, 8, 12), dtype=torch.bfloat16, adapter=torch.float32, biases=True):
    x = seeded((*m, K), seed=1, dtype=dtype).requires_grad_()
    out = OUT[: len(ranks)]
    w = [seeded((n, K), seed=n, dtype=dtype, scale=0.25) for n in out]
    a = [seeded((r, K), seed=r, dtype=adapter, scale=0.25).requires_grad_() for r in ranks]
    pairs = zip(out, ranks, strict=True)
    b = [seeded((n, r), seed=n, dtype=adapter).requires_grad_() for n, r in pairs]
    t = [seeded((n,), seed=9, dtype=dtype).requires_grad_() if biases else None for n in out]
    dys = [seeded((*m, n), seed=50 + n, dtype=dtype) for n in out]
    return (x, w, a, b, t), dys


def leaves_of(x, w, a, b, t):
    return [leaf for leaf in (x, *w, *a, *b, *t) if leaf is not None and leaf.requires_grad]


def exact(tensors, dys):
    """Outputs and gradients by autograd in float64."""

    def wide(tensor):
        if tensor is None:
            return None
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    x, w, a, b, t = wide(tensors[0]), *([wide(v) for v in each] for each in tensors[1:])
    ys = []
    for w_nk, a_rk, b_nr, bias in zip(w, a, b, t, strict=True):
        y = x @ w_nk.t() + SCALE * (x @ a_rk.t()) @ b_nr.t()
        ys.append(y if bias is None else y + bias)
    leaves = leaves_of(x, w, a, b, t)
    return [*ys, *gradients(ys, leaves, [dy if dy is None else dy.double() for dy in dys])]


def gradients(ys, leaves, dys):
    used = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    ys, dys = ([pair[i] for pair in used] for i in (0, 1))
    return torch.autograd.grad(ys, leaves, dys, allow_unused=True)


def check(layers, tensors, dys):
    ys, leaves = layers(*tensors), leaves_of(*tensors)
    got = [*ys, *gradients(ys, leaves, dys)]
    for g, e, like in zip(got, exact(tensors, dys), [*ys, *leaves], strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert (g.shape, g.dtype) == (like.shape, like.dtype)
            assert (g.double() - e).norm() <= 0.01 * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(3, 8, 12), (8, 16), (1, 1, 200)])
def test_types_and_ranks(layers, ranks, dtype):
    for adapter, biases in itertools.product((dtype, torch.float32), (False, True)):
        check(layers, *operands(ranks=ranks, dtype=dtype, adapter=adapter, biases=biases))
    calls = layers.extension.calls
    # x is read once each way.
    composed = ["forward"] + ["backward"] * (len(ranks) + 1)
    assert calls == (["group"] * 2 if layers.extension.gemm else composed) * 4


@pytest.mark.parametrize("name", list(inputs(K)))
def test_layouts_of_x_and_dy(layers, name):
    (_, *rest), _ = operands()
    x = inputs(K)[name].detach().requires_grad_()
    (_, *_), dys = operands(m=x.shape[:-1])
    check(layers, (x, *rest), dys)
    dy = inputs(OUT[0])[name]
    tensors, dys = operands(m=dy.shape[:-1])
    check(layers, tensors, [dy, *dys[1:]])


def test_layouts_of_the_weights_and_the_factors(layers):
    (x, w, a, b, t), dys = operands()
    w = [w[0].t().contiguous().t(), w[1][:1].expand(OUT[1], K), w[2]]
    a, b = ([v.detach().t().contiguous().t().requires_grad_() for v in each] for each in (a, b))
    check(layers, (x, w, a, b, t), dys)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("ranks", [(3, 8, 12), (8, 16)])
def test_nf4_weights(layers, ranks, nested):
    (x, w, a, b, t), dys = operands(ranks=ranks)
    parts = [packed(n, K, "cpu", nested=nested) for n in OUT[: len(ranks)]]
    w = [
        ops.nf4_dequantize(
            codes, absmax, (n, K), x.dtype, nested_absmax=inner, nested_offset=offset
        )
        for n, (codes, absmax, inner, offset) in zip(OUT, parts, strict=False)
    ]
    codes, nf4 = [each[0] for each in parts], [each[1:] for each in parts]

    def from_codes(x, w, a, b, t):
        return layers(x, codes, a, b, t, nf4=nf4)

    check(from_codes, (x, w, a, b, t), dys)


@pytest.mark.parametrize("absent", [(0,), (2,), (0, 1)])
def test_outputs_that_nobody_uses(layers, absent):
    tensors, dys = operands()
    check(layers, tensors, [None if i in absent else dy for i, dy in enumerate(dys)])


def test_every_set_of_wanted_gradients(layers):
    for wanted in itertools.product((False, True), repeat=7):
        (x, w, a, b, t), dys = operands(ranks=(3, 8), biases=False)
        for leaf, want in zip((x, *w, *a, *b), wanted, strict=True):
            leaf.requires_grad_(want)
        ys = layers(x, w, a, b, t)
        dys = [dy if y.requires_grad else None for dy, y in zip(dys, ys, strict=True)]
        if any(wanted):
            check(layers, (x, w, a, b, t), dys)


def test_no_rows(layers):
    tensors, dys = operands(m=(0, 5))
    ys, leaves = layers(*tensors), leaves_of(*tensors)
    assert [y.shape for y in ys] == [dy.shape for dy in dys]
    for leaf, grad in zip(leaves, gradients(ys, leaves, dys), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
    assert layers.extension.calls == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "there are kernels for float16 and bfloat16"),
        ({"scale": [1.0, 2.0, 3.0]}, "the members' scales differ: 1, 2, 3"),
        ({"mixed": True}, "the factors of the members must share a dtype"),
    ],
)
def test_what_the_kernels_do_not_take_is_composed(layers, change, reason):
    change = dict(change)
    scale = change.pop("scale", SCALE)
    mixed = change.pop("mixed", False)
    (x, w, a, b, t), dys = operands(**change)
    if mixed:
        a[1], b[1] = a[1].detach().bfloat16(), b[1].detach().bfloat16()
    scales = (scale,) * 3 if scale == SCALE else tuple(scale)
    plan = group._forward_plan(x, *w, *t, *a, *b, *[None] * 9, scales, 64)
    assert plan.reason.startswith(reason)
    with ops.recorded_kernels() as ran:
        ys = layers(x, w, a, b, t, scale)
        torch.autograd.backward(ys, dys)
    assert ran == [("lora_group", "reference"), ("lora_group_backward", "reference")]
    assert layers.extension.calls == []


def test_plans_are_made_once_and_checks_not_skipped(layers):
    (x, w, a, b, t), dys = operands()
    with ops.recorded_kernels() as ran:
        for _ in range(2):
            torch.autograd.backward(layers(x, w, a, b, t), dys)
    name = layers.extension.gemm or f"lora_group_skinny ({lora_extension.WHY})"
    assert ran == [("lora_group", name), ("lora_group_backward", name)] * 2
    with pytest.raises(ValueError, match=r"a\[1\] must have shape \[8, 16\], got \[8, 8\]"):
        layers(x, w, [a[0], a[1][:, :8], a[2]], b, t)
    with pytest.raises(TypeError, match=r"x is bfloat16 and weights\[2\] float32"):
        layers(x, [*w[:2], w[2].float()], a, b, t)


@pytest.mark.parametrize("ranks", [(3, 8, 12), (24, 40, 8)])
def test_gradients_that_are_added_to_those_there(layers, ranks):
    tensors, dys = operands(ranks=ranks)
    _, _, a, b, _ = tensors
    for factor in (*a, *b[1:]):
        _accumulate.mark(factor, True)
    torch.autograd.backward(layers(*tensors), dys)
    held = [factor.grad for factor in (*a, *b)]
    firsts = [grad.clone() for grad in held]
    torch.autograd.backward(layers(*tensors), dys)
    for factor, grad, first in zip((*a, *b), held, firsts, strict=True):
        assert factor.grad is grad
        torch.testing.assert_close(grad, first * 2)
