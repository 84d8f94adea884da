# SPDX-License-Identifier: Apache-2.0
"""What merging must not touch, what must not touch merged layers, and merging in float64."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyfast
from pyfast import IA3Config, LoraConfig
from pyfast.errors import AdapterStateError, ConfigError, UnsupportedError
from tests.models import fingerprint, gpt2, llama, logits, randomise

CONFIG = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


def plain_parametrization(layer):
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


MADE = [pruned, old_weight_norm, parametrizations.weight_norm, plain_parametrization]


@pytest.mark.parametrize("change", MADE)
def test_weights_that_are_made_before_each_forward(change):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(3, 64)
    change(model[1])
    pyfast.apply(model, CONFIG)
    expected, before = model(x), fingerprint(model)
    with pytest.raises(UnsupportedError, match=r"merge: the weight of '1' is made anew"):
        pyfast.merge(model)
    assert fingerprint(model) == before
    assert torch.equal(model(x), expected)


def test_only_layers_that_are_merged_matter():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(3, 64)
    pruned(model[1])
    pyfast.apply(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    expected = model(x)
    assert torch.allclose(pyfast.merge(model)(x), expected, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: pyfast.quantize(llama())])
@pytest.mark.parametrize("disabled", [False, True])
def test_loading_a_state_dict_into_merged_layers(make, disabled):
    model, other = (randomise(pyfast.apply(make(), CONFIG), seed=s) for s in (1, 2))
    state = other.state_dict()
    expected = logits(pyfast.merge(model))
    before = fingerprint(model)
    for loaded in (state, pyfast.adapter_state_dict(other)):
        block = pyfast.adapters_disabled(model)
        if disabled:
            block.__enter__()
        with pytest.raises(AdapterStateError, match=r"load_state_dict: .* pyfast\.unmerge first"):
            model.load_state_dict(loaded)
        if disabled:
            block.__exit__(None, None, None)
        assert fingerprint(model) == before
        assert torch.equal(logits(model), expected)
    pyfast.unmerge(model).load_state_dict(state)
    assert torch.equal(logits(model), logits(other))


def test_merged_layers_of_any_module_refuse_a_state_dict():
    model = pyfast.apply(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = fingerprint(pyfast.merge(model))
    with pytest.raises(AdapterStateError) as caught:
        model.load_state_dict(state)
    assert str(caught.value) == (
        "[PF017] load_state_dict: adapters ['default'] are merged into '0', so that what is loaded would not "
        "take part; call pyfast.unmerge first"
    )
    assert fingerprint(model) == before
    assert model.load_state_dict({}, strict=False).missing_keys


def test_float64_is_merged_in_float64():
    model = pyfast.apply(llama().double(), CONFIG)
    layer = model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.weight + 2.0 * b @ a
    expected = logits(model)
    pyfast.merge(model)
    assert torch.allclose(layer.weight, exact, rtol=1e-14, atol=1e-15)
    assert torch.allclose(logits(model), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_nf4_layers_in_another_dtype_than_the_rest_of_the_model(dora):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=dora)
    model = randomise(pyfast.apply(pyfast.quantize(llama()), config))
    expected, before = logits(model), fingerprint(model)
    with pytest.raises(ConfigError) as caught:
        pyfast.merge(model, dtype=torch.bfloat16)
    assert str(caught.value) == (
        "[PF018] merge: 4 NF4 layers would become dense in torch.bfloat16, but the other parameters of "
        "LlamaForCausalLM are in torch.float32, so that no forward could run; merge with "
        "dtype=torch.float32, or call model.to(torch.bfloat16) first. The model is unchanged"
    )
    assert fingerprint(model) == before
    assert torch.allclose(logits(pyfast.merge(model, dtype=model.dtype)), expected, atol=1e-4)
    pyfast.merge(pyfast.unmerge(model).to(torch.bfloat16), dtype=torch.bfloat16)
    assert torch.allclose(logits(model).float(), expected, atol=0.1)


def test_the_dtype_that_nf4_layers_had_is_checked_too():
    """Nobody asked for it, but it is as far from the rest of the model."""
    model = randomise(pyfast.apply(pyfast.quantize(llama().bfloat16()), CONFIG))
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.float()
    for layer in model.model.layers:
        layer.input_layernorm.float(), layer.post_attention_layernorm.float()
    expected = logits(model)
    with pytest.raises(ConfigError, match=r"14 NF4 layers .* merge with dtype=torch\.float32"):
        pyfast.merge(model)
    assert torch.allclose(logits(pyfast.merge(model, dtype=torch.float32)), expected, atol=5e-3)


def test_a_model_of_nf4_layers_alone_takes_any_dtype():
    model = pyfast.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    pyfast.apply(model, CONFIG)
    expected = [layer.base_weight.dense() + layer.delta("default") for layer in model]
    pyfast.merge(model, dtype=torch.float16)
    for layer, dense in zip(model, expected, strict=True):
        assert torch.equal(layer.weight, dense.half())


def test_ia3_in_the_scales_of_nf4_layers_makes_nothing_dense():
    model = pyfast.quantize(llama().bfloat16(), nested=False)
    pyfast.apply(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.float()
    pyfast.merge(model)
    assert isinstance(model.model.layers[0].self_attn.k_proj.base_layer, pyfast.nn.NF4Linear)
