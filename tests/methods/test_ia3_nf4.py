# SPDX-License-Identifier: Apache-2.0
"""IA3 merged into NF4 scales: round(code * (absmax * l)) to the last bit; and into dense weights."""

import pytest
import torch
import transformers

import pyfast
from pyfast import IA3Config
from pyfast.errors import QuantizedMergeError
from pyfast.nn import NF4Linear
from pyfast.nn.ia3 import IA3Linear
from pyfast.nn.nf4 import NF4_CODE
from tests.family_models import outputs, variant

bnb = pytest.importorskip("bitsandbytes")
# Outputs of K and V, apart and in each layout of a fused linear; all have rows of 64 weights.
OUTPUTS = {
    "llama": ["k_proj", "v_proj"],
    "qwen2": ["k_proj", "v_proj"],  # with biases
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "falcon-40b": ["query_key_value"],
    "gpt_bigcode": ["c_attn"],
    "t5": ["k", "v"],
}


def model(name, dtype=torch.float32, *, nested=False, blocksize=64):
    """An NF4 model whose factors are far from one, some of them negative or zero."""
    base = pyfast.quantize(variant(name).to(dtype), nested=nested, blocksize=blocksize)
    config = IA3Config(target_modules=OUTPUTS[name], feedforward_modules=[])
    made = pyfast.apply(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in pyfast.adapter_parameters(made).values():
            parameter.copy_(1 + 0.7 * torch.randn(parameter.shape, generator=generator))
            parameter[1] = 0
    return made


def layers(made):
    """Every adapted layer and its factors."""
    found = [m for m in made.modules() if isinstance(m, IA3Linear)]
    assert found
    return [(layer, layer.vector("default").detach()) for layer in found]


def codes(weight):
    """The 4-bit codes of a weight as float32 values, block by block."""
    packed = weight.packed.flatten()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return NF4_CODE[indices].view(-1, weight.blocksize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OUTPUTS)
def test_values_are_codes_times_scaled_absmax_rounded_once(name, dtype):
    made = model(name, dtype)
    before = [(layer.base_weight, vector) for layer, vector in layers(made)]
    pyfast.merge(made)
    for (weight, vector), (layer, _) in zip(before, layers(made), strict=True):
        assert isinstance(layer.base_layer, NF4Linear)
        merged = layer.base_weight
        assert torch.equal(merged.packed, weight.packed)
        absmax = weight.absmax.view(len(vector), -1) * vector[:, None]
        expected = (codes(weight) * absmax.view(-1, 1)).to(dtype).view(weight.shape)
        assert torch.equal(merged.dense(), expected)
        state = bnb.functional.QuantState(
            merged.absmax,
            shape=torch.Size(merged.shape),
            code=NF4_CODE,
            blocksize=merged.blocksize,
            quant_type="nf4",
            dtype=dtype,
        )
        theirs = bnb.functional.dequantize_4bit(merged.packed.view(-1, 1), state)
        assert torch.equal(merged.dense(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OUTPUTS)
def test_dense_merge_differs_by_its_rounding_alone(name, dtype):
    """It rounds the weight to its dtype, scales it and rounds again; scales stay in float32 until the end."""
    made, dense = model(name, dtype), model(name, dtype)
    expected = outputs(made).float()
    exact = [layer.base_weight.dense(torch.float64) * v[:, None] for layer, v in layers(made)]
    pyfast.merge(made)
    pyfast.merge(dense, dtype=dtype)
    for (ours, _), (other, _), product in zip(layers(made), layers(dense), exact, strict=True):
        packed, whole = ours.base_weight, other.base_weight
        torch.testing.assert_close(packed.dense(torch.float64), product, rtol=2**-22, atol=0)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(packed.dense(), whole.dense(), rtol=2 * eps, atol=0)
    near = 1e-5 if dtype == torch.float32 else 0.05
    for merged in (made, dense):
        torch.testing.assert_close(outputs(merged).float(), expected, rtol=near, atol=near)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_survives_saving(name, tmp_path):
    made = model(name)
    expected = outputs(made)
    pyfast.unload(pyfast.merge(made)).save_pretrained(tmp_path)
    config = pyfast.NF4Config.model_config(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, dtype=torch.float32
    )
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OUTPUTS)
def test_nested_scales_are_refused_and_dense_weights_take_the_factors(name):
    made = model(name, nested=True)
    expected = outputs(made)
    with pytest.raises(QuantizedMergeError, match="in 8 bits themselves and would be rounded"):
        pyfast.merge(made)
    pyfast.merge(made, dtype=torch.float32)
    torch.testing.assert_close(outputs(made), expected, rtol=1e-4, atol=1e-5)


def test_blocks_that_cross_rows_are_refused():
    made = model("llama", blocksize=128)
    with pytest.raises(QuantizedMergeError, match=r"no multiple of it \(64\)"):
        pyfast.merge(made)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-7b", "t5", "mixtral", "recurrent_gemma"])
def test_factors_of_inputs_go_into_the_columns_of_the_next_linear(name):
    """W (l * x) = (W diag(l)) x, to the last bit of the rounded product."""
    made = pyfast.apply(variant(name), IA3Config())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in pyfast.adapter_parameters(made).values():
            parameter.copy_(1 + 0.7 * torch.randn(parameter.shape, generator=generator))
    expected = outputs(made)
    inputs = [layer for layer, _ in layers(made) if layer.on_input["default"]]
    columns = [layer.base_weight.dense() * layer.vector("default")[None, :] for layer in inputs]
    assert bool(inputs) == (name != "mixtral")  # its experts hold 3-D tensors
    pyfast.merge(made)
    assert all(
        torch.equal(layer.base_weight.dense(), product)
        for layer, product in zip(inputs, columns, strict=True)
    )
    torch.testing.assert_close(outputs(made), expected, rtol=1e-4, atol=1e-5)
