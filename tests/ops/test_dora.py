# SPDX-License-Identifier: Apache-2.0
"""DoRA's ops without a GPU: against float64, and what is kept of y for the backward."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pyfast import ops
from pyfast.ops import OPS
from pyfast.ops import dora as module
from pyfast.testing import assert_accurate, seeded
from tests.cases import dora_args, lora_args

SCALE = 0.75


def operands(m, n, k, r, dtype, seed=0):
    """x, W, A, B, the magnitudes and dy; the third row of W + s B A is zero, the fourth's magnitude."""
    x, w, _, a, b, *_ = lora_args((m,), n, k, r, "cpu", dtype)
    with torch.no_grad():
        w[2], b[2] = 0, 0
    magnitude = 1 + seeded((n,), seed=7, dtype=dtype, scale=0.3)
    magnitude[3] = 0
    return x, w, a, b, magnitude.requires_grad_(), seeded((m, n), seed=8, dtype=dtype)


def results(x, w, a, b, magnitude, dy, function):
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, magnitude)]
    y = function(leaves[0], w, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def plain(x, w, a, b, magnitude):
    """The definition, with constants for norms."""
    norms = torch.linalg.vector_norm((w + SCALE * b @ a).detach(), dim=1)
    norms = norms.masked_fill(norms == 0, 1)
    return magnitude / norms * (x @ w.t() + SCALE * x @ a.t() @ b.t())


def ours(x, w, a, b, magnitude):
    norms = ops.dora_norms(w, a, b, scale=SCALE)
    return ops.dora_linear(x, w, a, b, magnitude, norms, scale=SCALE)


def raw(x, w, a, b, magnitude):
    """The op that serves CUDA, by its reference."""
    norms = ops.dora_norms(w, a, b, scale=SCALE)
    nf4 = (None, None, None, 64)
    return OPS["dora_linear"].call(x, w, a, b, magnitude, norms, SCALE, *nf4)[0]


@pytest.mark.parametrize("function", [ours, raw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 12, 16, 3), (1, 8, 8, 1), (33, 40, 24, 16)], ids=str)
def test_is_as_near_to_float64_as_torch(shape, dtype, function):
    args = operands(*shape, dtype)
    exact = results(*(t.detach().double() for t in args), plain)
    rough = results(*args, plain)
    for name, got, low, right in zip(
        ("y", "dx", "dA", "dB", "dm"), results(*args, function), rough, exact, strict=True
    ):
        assert got.dtype is dtype
        # Few values: single roundings decide.
        slack = 1e-5 if dtype is torch.float32 else 2e-3 * (8 if dtype is torch.bfloat16 else 1)
        assert_accurate(got, low, right, what=name, eps=slack)


def test_norms_take_the_magnitudes_rounding_and_zero_counts_as_one():
    norms = torch.tensor([1.0009765625 + 2**-9, 0.0])
    magnitude = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    found = module.column_scale(magnitude, norms)
    assert torch.equal(found, torch.tensor([1.0 / norms.bfloat16().float()[0].item(), 3.0]))


# --- y in the backward --------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch):
    """What each backward is given as y."""
    seen, backward = [], module._dora_backward

    def spy(grad_y, x, z, y, *rest):
        seen.append(y.clone())
        return backward(grad_y, x, z, y, *rest)

    monkeypatch.setattr(module, "_dora_backward", spy)
    return seen


def call(args):
    return OPS["dora_linear"].call(*args)[0]


@pytest.fixture
def args():
    return dora_args((5,), 12, 16, 3, "cpu", torch.float32)


def test_y_is_kept_and_not_copied(given, args, monkeypatch):
    y = call(args)
    expected = y.detach().clone()
    monkeypatch.setattr(module, "_dora", None)  # would make it again
    y.sum().backward()
    assert torch.equal(given[0], expected)


def test_y_that_was_changed_is_made_again(given, args):
    expected = call(args).detach()
    y = call(args)
    y.view(-1).mul_(2).relu_()
    y.sum().backward()
    assert torch.equal(given[0], expected)


def test_a_second_backward_makes_y_again(given, args):
    y = call(args)
    expected = y.detach().clone()
    first = torch.autograd.grad(y.sum(), args[4], retain_graph=True)
    second = torch.autograd.grad(y.sum(), args[4])
    assert torch.equal(first[0], second[0])
    assert torch.equal(given[0], expected)
    assert torch.equal(given[1], expected)


def changed(args):
    return call(args).mul_(2).relu_()


@pytest.mark.parametrize("function", [call, changed])
@pytest.mark.parametrize("kind", ["checkpoint", "reentrant", "offload", "identity"])
def test_y_under_hooks(kind, function, given, args):
    expected = call(args).detach()
    hooks = {
        "offload": torch.autograd.graph.save_on_cpu(),
        "identity": torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    }
    if kind in hooks:
        with hooks[kind]:
            y = function(args)
    else:
        y = checkpoint(
            lambda x: function((x, *args[1:])), args[0], use_reentrant=kind != "checkpoint"
        )
    y.sum().backward()
    assert torch.equal(given[0], expected)


def test_y_is_let_go_of_though_the_graph_lives_on(given, args):
    y = call(args)
    node = y.grad_fn
    assert node.y is not None
    y.sum().backward()
    assert node.y is None
    assert len(given) == 1


def test_without_magnitudes_to_train_nothing_of_y_is_kept(args):
    args[4].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call(args)
    assert y.grad_fn.y is None
    assert y.shape not in [t.shape for t in kept]


def test_compiled_code_may_change_y(args):
    def run(*args):
        return OPS["dora_linear"].overload(*args)[0].mul_(2).relu_()

    run(*args).sum().backward()
    expected = args[4].grad.clone()
    args[4].grad = None
    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend="aot_eager")(*args).sum().backward()
    torch.testing.assert_close(args[4].grad, expected)
