# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels behind `lora_group` are launched, see `lora_extension`."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from pyfast import ops
from pyfast.ops import _lora_group_launch
from pyfast.testing import seeded
from tests.ops import lora_extension
from tests.ops.lora_extension import DTYPES, at, inputs, use

group = importlib.import_module("pyfast.ops.lora_group")
K, OUT, SCALE = 16, (24, 8, 40), 0.75


class Extension(lora_extension.Extension):
    """Without W, as the group calls it: what lies between the columns of z and dz belongs to others."""

    def lora_forward(self, *args):
        assert args[10] == 0
        assert args[21:23] == (0, 0)
        return super().lora_forward(*args)

    def lora_backward(self, *args):
        _, w, _, b, scale, _ = self.problem(args[:21])
        dy, pitch_dy, z, dz, dx, da, db = args[21:]
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


@pytest.fixture
def layers(monkeypatch):
    """`lora_group` by the launches for CUDA."""
    extension = Extension("")
    use(extension, group, _lora_group_launch, monkeypatch)
    monkeypatch.setattr(group, "_group_backward", group._backward_kernel)

    def run(x, w, a, b, t, scale=SCALE):
        full = [None] * (3 - len(w))
        scales = [scale] * len(w) if isinstance(scale, float) else scale
        args = (x, *w, *full, *t, *full, *a, *full, *b, *full, scales)
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
    assert calls == (["forward"] + ["backward"] * (len(ranks) + 1)) * 4  # x is read once each way


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
    scale = change.pop("scale", SCALE)
    mixed = change.pop("mixed", False)
    (x, w, a, b, t), dys = operands(**change)
    if mixed:
        a[1], b[1] = a[1].detach().bfloat16(), b[1].detach().bfloat16()
    plan = group._forward_plan(x, *w, *t, *a, *b, (scale,) * 3 if scale == SCALE else tuple(scale))
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
    names = [("lora_group", "lora_group_skinny"), ("lora_group_backward", "lora_group_skinny")]
    assert ran == names * 2
    with pytest.raises(ValueError, match=r"a\[1\] must have shape \[8, 16\], got \[8, 8\]"):
        layers(x, w, [a[0], a[1][:, :8], a[2]], b, t)
    with pytest.raises(TypeError, match=r"weights\[2\] must be bfloat16, got float32"):
        layers(x, [*w[:2], w[2].float()], a, b, t)
