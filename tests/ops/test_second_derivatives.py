# SPDX-License-Identifier: Apache-2.0
"""Second derivatives: refused, not left out; constant first derivatives take part in those of others."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pyfast import ops
from pyfast.testing import seeded


def layer(x, adapters=True):
    w, a, b = (
        seeded(shape, seed=i, dtype=torch.float64).requires_grad_(i > 0 and adapters)
        for i, shape in enumerate([(3, 6), (2, 6), (3, 2)])
    )
    plain = functional.linear(x, w) + functional.linear(functional.linear(x, a), b)
    return ops.lora_linear(x, w, a, b, scale=1.0), plain


def test_a_derivative_by_factors_is_not_left_out_of_a_derivative_by_the_input():
    x = seeded((4, 6), seed=5, dtype=torch.float64).requires_grad_()
    y, plain = layer(x)  # the gradients that come in are constants
    (want,) = torch.autograd.grad(plain.sum(), x, create_graph=True)
    assert want.requires_grad
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(grad, want)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.sum() + x.sum()).backward()


def test_a_constant_derivative_takes_part_in_second_ones():
    grads = []
    for which in (0, 1):
        x = seeded((4, 6), seed=5, dtype=torch.float64).requires_grad_()
        y = layer(torch.tanh(x), adapters=False)[which]
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*grads)
