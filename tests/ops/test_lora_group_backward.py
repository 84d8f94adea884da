# SPDX-License-Identifier: Apache-2.0
"""Backwards of some of a group's members, one after the other, of batches: as if each were a layer alone."""

import gc
import itertools
import weakref

import pytest
import torch

from tests.ops.test_lora_group import (
    SCALES,
    composition,
    flat,
    grouped,
    operands,
    outputs_like,
    results,
)


@pytest.mark.parametrize("used", [s for n in (1, 2) for s in itertools.combinations(range(3), n)])
def test_outputs_that_nobody_uses(used, device):
    tensors = operands(device=device)
    dys = [dy if i in used else None for i, dy in enumerate(outputs_like(tensors))]
    got, want = (results(f, tensors, SCALES, dys) for f in (grouped, composition))
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) == (theirs is None)  # an optimiser takes no step without a gradient
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_graph_used_again():
    tensors = operands()
    ys = grouped(*tensors, SCALES)
    leaves = flat(*tensors)
    first = torch.autograd.grad(sum(y.sum() for y in ys), leaves, retain_graph=True)
    second = torch.autograd.grad(sum(y.sum() for y in ys), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", [([0], [1], [2]), ([2], [0, 1])])
def test_one_after_the_other_without_retain_graph(order):
    tensors = operands()
    got, want = [], []
    for function, into in ((grouped, got), (composition, want)):
        ys = function(*tensors, SCALES)
        for used in order:
            torch.autograd.backward([ys[i].square().sum() for i in used])
        for leaf in flat(*tensors):
            into.append(leaf.grad)
            leaf.grad = None
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_waits_for_another_backward_is_watched():
    tensors = operands()
    ys = grouped(*tensors, SCALES)
    ys[0].sum().backward()
    with torch.no_grad():
        tensors[3][1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[1].sum().backward()


def test_what_waits_is_freed_with_the_last_member():
    x, *rest = operands()
    inner = x + 0
    kept = weakref.ref(inner)
    ys = grouped(inner, *rest, SCALES)
    del inner
    for y in ys:
        assert kept() is not None
        y.sum().backward()
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        ys[0].sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)])
def test_gradients_of_a_batch(used):
    """As `torch.autograd.functional.jacobian(vectorize=True)` wants them."""
    tensors = operands(m=(2, 3))
    dys = [torch.stack([dy, dy.flip(0), -dy]) for dy in outputs_like(tensors)]
    got, want = [], []
    for function, into in ((grouped, got), (composition, want)):
        ys = function(*tensors, SCALES)
        pairs = [[each[i] for i in used] for each in (ys, dys)]
        options = {"is_grads_batched": True, "allow_unused": True}
        into += torch.autograd.grad(pairs[0], flat(*tensors), pairs[1], **options)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused():
    tensors = operands()
    y = grouped(*tensors, SCALES)[1]
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
