# SPDX-License-Identifier: Apache-2.0
"""The frame of an adapted module, apart from any method."""

import copy

import pytest
import torch
from torch import nn

from pyfast import ops
from pyfast.errors import AdapterStateError
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear, SavedModule
from pyfast.nn.group import form_groups
from pyfast.nn.weight import NF4Weight


def layer(bias=True):
    torch.manual_seed(0)
    made = LoraLinear(nn.Linear(6, 4, bias))
    made.add("default", 2, 2.0, 0.0, False, torch.float32)
    made.set_active(["default"])
    return made


def test_looks_like_a_linear_layer():
    made = layer()
    assert (made.in_features, made.out_features) == (6, 4)
    assert made.weight is made.base_layer.weight
    assert made.bias is made.base_layer.bias
    assert layer(bias=False).bias is None


def test_forward_is_the_formula():
    made, x = layer(), torch.randn(2, 3, 6)
    a, b = made.lora_A["default"].weight, made.lora_B["default"].weight
    expected = x @ made.weight.T + made.bias + 2.0 * (x @ a.T) @ b.T
    assert torch.allclose(made(x), expected, atol=1e-6)
    made.disable()
    assert torch.equal(made(x), made.base_layer(x))


def test_hooks_on_the_base_layer_still_run():
    made, x, seen = layer(), torch.randn(2, 6), []
    fused = made(x)
    made.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.allclose(made(x), fused, atol=1e-6)
    assert len(seen) == 1


def test_a_base_whose_forward_was_replaced_is_called():
    made, x, seen = layer(), torch.randn(2, 6), []
    fused, forward = made(x), made.base_layer.forward
    made.base_layer.forward = lambda x: seen.append(1) or forward(x)
    assert torch.allclose(made(x), fused, atol=1e-6)
    assert len(seen) == 1
    with pytest.raises(AdapterStateError):
        made.merge(["default"], None)


def test_merge_holds_nothing_in_the_state_dict_and_survives_moves():
    made = layer()
    keys, original = set(made.state_dict()), made.weight.detach().clone()
    made.merge(["default"], None)
    assert set(made.state_dict()) == keys
    assert not torch.equal(made.weight, original)
    twin = copy.deepcopy(made)
    made.unmerge()
    twin.half()
    twin.unmerge()
    assert torch.equal(made.weight, original)
    assert torch.equal(twin.weight, original.half())


def test_a_base_that_is_no_longer_linear():
    made = layer()
    made.base_layer = nn.Identity()
    with pytest.raises(AdapterStateError, match="Identity is not a linear layer that can be read"):
        made.in_features  # noqa: B018


def test_saved_module_serves_copy_or_original():
    saved = SavedModule(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    saved.add("a")
    saved.set_active(["b", "a"])
    saved.modules_to_save["a"].weight.data.add_(1)
    assert torch.equal(saved(x), saved.modules_to_save["a"](x))
    assert saved.weight is saved.modules_to_save["a"].weight
    assert saved.out_features == 2
    saved.disable()
    assert torch.equal(saved(x), saved.original_module(x))
    with pytest.raises(AttributeError):
        saved.nothing  # noqa: B018
    twin = copy.deepcopy(saved)
    saved.remove("a")
    assert saved.adapter_names() == []
    assert twin.adapter_names() == ["a"]


def test_an_input_of_another_dtype_than_the_weight():
    text = r"lora_linear: x is float32 and weight bfloat16\. Fix: cast x to bfloat16, or call the model under"
    base = nn.Linear(64, 8, dtype=torch.bfloat16).requires_grad_(False)
    made, x = LoraLinear(base), torch.randn(2, 64)
    made.add("default", 2, 2.0, 0.5, False, torch.float32)
    made.set_active(["default"])
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=text):
        made(x)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype is torch.bfloat16
    # NF4 has no dtype of its own: the product takes the input's.
    packed = LoraLinear(
        NF4Linear(NF4Weight(*ops.nf4_quantize(base.weight), (8, 64), base.weight.dtype))
    )
    packed.add("default", 2, 2.0, 0.5, False, torch.float32)
    packed.set_active(["default"])
    assert packed(x).dtype is torch.float32


def test_members_of_a_group_name_the_weight():
    made = nn.ModuleDict()
    for name in "qk":
        made[name] = LoraLinear(nn.Linear(6, 4, dtype=torch.bfloat16).requires_grad_(False))
        made[name].add("default", 2, 2.0, 0.0, False, torch.float32)
        made[name].set_active(["default"])
    form_groups([made])
    x = torch.randn(2, 6)
    for name in "qk":
        with pytest.raises(TypeError, match=r"lora_group: x is float32 and weights\[0\] bfloat16"):
            made[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert {made[name](x).dtype for name in "qk"} == {torch.bfloat16}
