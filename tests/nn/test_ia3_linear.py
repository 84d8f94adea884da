# SPDX-License-Identifier: Apache-2.0
"""Which op serves an IA3 layer that scales its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from pyfast import ops
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear, weight_of
from pyfast.nn.ia3 import IA3Linear
from pyfast.testing import seeded

K, N, ROWS = 64, 32, 40


def with_hook(layer):
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer.requires_grad_(False)


def with_lora(layer):
    outer = LoraLinear(layer)
    outer.add("default", 4, 1.0, 0.0, False, torch.float32)
    outer.set_active(["default"])
    return outer


OTHERS = {
    "a trained weight": lambda layer: layer.requires_grad_(),
    "a hook": with_hook,
    "a mask": pruned,
    "LoRA": with_lora,
    "NF4": lambda layer: NF4Linear.from_weight(weight_of(layer)),
    "Conv1D": lambda layer: Conv1D(N, K).requires_grad_(False),
}


def linear():
    torch.manual_seed(0)
    return nn.Linear(K, N).requires_grad_(False)


def adapted(base, on_input=True):
    layer = IA3Linear(base)
    layer.add("default", on_input, None, ones=False)
    layer.set_active(["default"])
    return layer


def run(layer, x):
    """y, the gradients of x and of the vector, and the ops that ran forward."""
    vector = layer.ia3_l["default"]
    with ops.recorded_kernels() as ran:
        y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), (x, vector))
    return (y.detach(), *grads), [op for op, _ in ran]


def by_hand(layer, base, x):
    vector = layer.ia3_l["default"]
    y = base(x * vector.flatten())
    return (y.detach(), *torch.autograd.grad(y.square().sum(), (x, vector)))


def check(layer, base, expected):
    x = seeded((2, ROWS // 2, K), seed=1).requires_grad_()
    got, ran = run(layer, x)
    assert ran[0] == expected
    for g, e in zip(got, by_hand(layer, base, x), strict=True):
        torch.testing.assert_close(g, e)


def test_a_frozen_linear_is_served_as_one():
    base = linear()
    check(adapted(base), base, "scaled_linear")


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_keep_their_own_forward(name):
    base = OTHERS[name](linear())
    check(adapted(base), base, "adapter_scale")


def test_both_sides_of_one_layer():
    base = linear()
    layer = adapted(base)
    layer.add("outer", False, None, ones=False)
    layer.set_active(["default", "outer"])
    x = seeded((ROWS, K), seed=1).requires_grad_()
    (y, *_), ran = run(layer, x)
    assert ran[0] == "scaled_linear"
    assert "adapter_scale" in ran
    torch.testing.assert_close(y, base(x * layer.vector("default")) * layer.vector("outer"))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    layer, x = adapted(linear()), seeded((ROWS, K), seed=1).requires_grad_()
    vector = layer.ia3_l["default"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        y = call(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, vector))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
