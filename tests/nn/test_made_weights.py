# SPDX-License-Identifier: Apache-2.0
"""`weight_of` reads weights that are no parameters of their module."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pyfast.nn import weight_of


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_made_from_others(bias):
    pruned = prune.random_unstructured(nn.Linear(5, 3, bias), "weight", 0.5)
    normed = parametrizations.weight_norm(nn.Linear(5, 3, bias))
    plain = nn.Linear(5, 3, bias)
    values = plain.weight.detach().clone()
    del plain.weight
    plain.weight = values
    for layer in (pruned, normed, plain):
        assert "weight" not in layer._parameters
        weight = weight_of(layer)
        assert torch.equal(weight.dense(), layer.weight)
        assert weight.bias is layer.bias
