# SPDX-License-Identifier: Apache-2.0
"""Gradients of factors that kernels add to `.grad` themselves."""

from __future__ import annotations

import contextlib
import copy

import peft
import pytest
import torch
from torch import nn

import pyfast
from pyfast import ops
from pyfast.errors import NoGradientError
from pyfast.ops import _accumulate
from pyfast.ops.lora_group import lora_group
from pyfast.testing import assert_accurate, seeded

# Rows, N of each member, K, R: skinny kernels, GEMMs that make all, torch's products above rank 16.
SHAPES = {
    "few rows": (70, (264,), 512, 8),
    "making": (1100, (2048,), 2048, 16),
    "many ranks": (1100, (2048,), 2048, 64),
    "group": (1100, (2048, 512, 512), 2048, 16),
    "group of many ranks": (1100, (2048, 512), 2048, 64),
    "small group": (70, (264, 136), 512, 8),
}


class Product(torch.autograd.Function):
    """x * a, whose backward says whether a's gradient would go past torch."""

    said: bool | None = None

    @staticmethod
    def forward(ctx, x, bias, a):
        ctx.save_for_backward(x, a)
        return x * a

    @staticmethod
    def backward(ctx, grad):
        x, a = ctx.saved_tensors
        Product.said = _accumulate.goes_into_grad(ctx, 1, a)
        return grad * a, None, grad * x


def answer(a, ask):
    x = torch.ones(3, requires_grad=True)
    ask(Product.apply(x, None, a).sum(), x)
    return Product.said


def backward(loss, _x):
    loss.backward()


def leaf(marked=True):
    a = torch.ones(3, requires_grad=True)
    _accumulate.mark(a, marked)
    return a


def test_only_what_is_marked_and_what_backward_would_accumulate():
    assert answer(leaf(), backward) is True
    assert answer(leaf(False), backward) is False
    a = leaf()
    assert answer(a, lambda loss, x: torch.autograd.grad(loss, [x])) is False
    assert answer(a, lambda loss, x: torch.autograd.grad(loss, [a])) is False
    assert answer(a, lambda loss, x: loss.backward(inputs=[x])) is False
    assert answer(a, lambda loss, x: loss.backward(inputs=[a])) is True
    a.grad = torch.zeros(3, dtype=torch.float32)
    assert answer(a, backward) is True
    _accumulate.mark(a, False)
    assert answer(a, backward) is False


def test_not_past_hooks():
    a = leaf()
    handle = a.register_hook(lambda grad: None)
    assert answer(a, backward) is False
    handle.remove()
    assert answer(a, backward) is True
    a.register_post_accumulate_grad_hook(lambda parameter: None)
    assert answer(a, backward) is False


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_not_into_a_grad_of_another_kind():
    a = torch.ones(2, 3, requires_grad=True)
    _accumulate.mark(a, True)
    x = torch.ones(2, 3)
    for grad in (torch.ones(2, 3), torch.ones(3, 2).t()):
        a.grad = grad
        Product.apply(x, None, a).sum().backward()
        assert Product.said is grad.is_contiguous()
        assert torch.equal(a.grad, torch.full((2, 3), 2.0))
    odd = torch.ones(3, 2).t().requires_grad_()
    _accumulate.mark(odd, True)
    Product.apply(x, None, odd).sum().backward()
    assert Product.said is False


def test_a_model(device):
    model = nn.ModuleDict({"a": nn.Linear(16, 24), "b": nn.Linear(24, 16)}).to(device)
    with pytest.raises(NoGradientError, match=r"ModuleDict has no LoRA linear .* pyfast\.apply\("):
        pyfast.accumulate_in_kernels(model)
    pyfast.apply(model, pyfast.LoraConfig(r=4, target_modules=["a", "b"]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    assert_adds_up(model, device)


def test_a_model_of_peft(device, monkeypatch):
    """Its factors are marked, and those that are marked are what the op is called with."""
    base = nn.ModuleDict({"a": nn.Linear(16, 24), "b": nn.Linear(24, 16)})
    config = peft.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False)
    model = peft.PeftModel(base, config).to(device).base_model.model
    with pytest.raises(
        NoGradientError, match=r"or pyfast\.accelerate\(model\) where PEFT's is there"
    ):
        pyfast.accumulate_in_kernels(model)
    pyfast.accelerate(model)
    assert_adds_up(model, device)
    given, call = [], pyfast.ops.lora._lora

    def watched(*args):
        given.extend(args[3:5])
        return call(*args)

    with maybe_warned(device):
        pyfast.accumulate_in_kernels(model)
    monkeypatch.setattr(pyfast.ops.lora, "_lora", watched)
    model["b"](model["a"](torch.ones(5, 16, device=device)))
    assert len(given) == 4
    assert all(_accumulate.is_marked(factor) for factor in given)


def maybe_warned(device):
    """On a CPU no kernel adds, and the call says so."""
    if device == "cuda":
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=r"the 4 factors of ModuleDict are on cpu, where torch")


def assert_adds_up(model, device):
    twin = copy.deepcopy(model)
    with maybe_warned(device):
        assert pyfast.accumulate_in_kernels(model) == 4
    for seed in (1, 2):
        for each in (model, twin):
            each["b"](
                each["a"](seeded((5, 16), seed=seed, device=device))
            ).square().sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    marked = [p for p in model.parameters() if _accumulate.is_marked(p)]
    assert len(marked) == 4
    pyfast.accumulate_in_kernels(model, enabled=False)
    assert not any(_accumulate.is_marked(p) for p in model.parameters())


def composition(x, ws, a, b, dys):
    """The gradients of all factors by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (*a, *b)]
    count = len(ws)
    for w, a_rk, b_nr, dy in zip(ws, leaves[:count], leaves[count:], dys, strict=True):
        y = x @ w.t() + (x @ a_rk.t() * 2.0) @ b_nr.t()
        y.backward(dy)
    return [t.grad for t in leaves]


def step(x, ws, factors, dys):
    count = len(ws)
    a, b = factors[:count], factors[count:]
    if count == 1:
        ys = [ops.lora_linear(x, ws[0], a[0], b[0], scale=2.0)]
    else:
        ys = lora_group(x, ws, a, b, scales=[2.0] * count)
    torch.autograd.backward(ys, dys)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_backwards_add_up(shape, adapter):
    m, outs, k, r = SHAPES[shape]
    half, cuda = torch.bfloat16, torch.device("cuda")
    ws = [seeded((n, k), seed=1, dtype=half, device=cuda, scale=k**-0.5) for n in outs]
    a = [seeded((r, k), seed=2, dtype=adapter, device=cuda, scale=k**-0.5) for _ in outs]
    b = [seeded((n, r), seed=3, dtype=adapter, device=cuda, scale=r**-0.5) for n in outs]
    batches = [
        (
            seeded((m, k), seed=seed, dtype=half, device=cuda),
            [seeded((m, n), seed=seed + 1, dtype=half, device=cuda) for n in outs],
        )
        for seed in (5, 15)
    ]
    factors = [t.clone().requires_grad_() for t in (*a, *b)]
    for factor in factors:
        _accumulate.mark(factor, True)
    calls = []
    for factor in factors:  # what torch would run
        node = factor.expand_as(factor).grad_fn.next_functions[0][0]
        node.register_hook(
            lambda _, grads: calls.extend(grad for grad in grads if grad is not None)
        )
    held = None
    for x, dys in batches:
        step(x.clone().requires_grad_(), ws, factors, dys)
        if held is None:
            held = [factor.grad for factor in factors]
    assert not calls
    assert all(mine.grad is first for mine, first in zip(factors, held, strict=True))

    def summed(dtype):
        parts = [
            composition(x.to(dtype), [w.to(dtype) for w in ws], [t.to(dtype) for t in a],
                        [t.to(dtype) for t in b], [dy.to(dtype) for dy in dys])
            for x, dys in batches
        ]  # fmt: skip
        return [one + two for one, two in zip(*parts, strict=True)]

    for factor, plain, exact in zip(factors, summed(half), summed(torch.float64), strict=True):
        assert factor.grad.dtype is adapter
        assert_accurate(factor.grad, plain, exact, what=shape)
