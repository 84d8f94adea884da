# SPDX-License-Identifier: Apache-2.0
"""`weight_of`: which modules are linear layers that our ops may serve."""

import copy
import pickle

import accelerate
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyfast.nn import DenseWeight, NF4Linear, NF4Weight, register_format, weight_of
from pyfast.nn.adapter_layer import has_hooks
from tests.models import FalconLikeLinear


class KeptForward(nn.Linear):
    """A subclass that changes nothing about the product."""


def test_dense_linear_is_viewed_without_a_copy():
    layer = nn.Linear(5, 3)
    weight = weight_of(layer)
    assert isinstance(weight, DenseWeight)
    assert weight.dense() is layer.weight
    assert weight.bias is layer.bias
    assert (weight.out_features, weight.in_features, weight.dtype) == (3, 5, torch.float32)
    assert isinstance(weight_of(KeptForward(5, 3)), DenseWeight)


def test_conv1d_is_a_transposed_view():
    layer = Conv1D(3, 5)
    weight = weight_of(layer)
    assert (weight.out_features, weight.in_features) == (3, 5)
    assert weight.dense().data_ptr() == layer.weight.data_ptr()
    assert torch.equal(weight.dense(), layer.weight.t())


def test_nf4_linear():
    weight = weight_of(NF4Linear.from_weight(weight_of(nn.Linear(64, 8))))
    assert isinstance(weight, NF4Weight)
    assert weight.device == torch.device("cpu")
    assert weight.dtype == torch.float32


def test_modules_with_rules_of_their_own_are_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    patched = nn.Linear(5, 3)
    patched.forward = lambda x: x
    integer = nn.Linear(5, 3)
    integer.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.int8), requires_grad=False)
    fp4 = bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")
    others = [
        FalconLikeLinear(5, 3),
        bnb.nn.Linear8bitLt(5, 3, has_fp16_weights=False),
        fp4,
        bnb.nn.Linear4bit(64, 64, quant_type="nf4"),
        patched,
        integer,
        nn.Embedding(5, 3),
        nn.Conv1d(5, 3, 1),
        nn.Bilinear(5, 3, 2),
        nn.LayerNorm(5),
    ]
    assert [weight_of(module) for module in others] == [None] * len(others)


def test_a_format_is_registered_by_name():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Parameter(torch.ones(3, 5))

        def forward(self, x):
            return x @ (2 * self.part).T

    name = f"{Doubled.__module__}.{Doubled.__qualname__}"
    register_format(name, lambda module: DenseWeight(2 * module.part))
    assert torch.equal(weight_of(Doubled()).dense(), torch.full((3, 5), 2.0))


def test_a_layer_whose_hooks_were_removed_is_served_again():
    layer = nn.Linear(5, 3)
    accelerate.cpu_offload(layer, torch.device("cpu"))
    assert weight_of(layer) is None
    assert has_hooks(layer)
    accelerate.hooks.remove_hook_from_module(layer)
    assert "forward" in vars(layer)  # left by accelerate, the class's own
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(weight_of(each), DenseWeight)
        assert not has_hooks(each)
    other = nn.Linear(5, 3)
    other.forward = layer.forward
    assert weight_of(other) is None
