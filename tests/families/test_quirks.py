# SPDX-License-Identifier: Apache-2.0
"""What families do differently from Llama, where an adapter, a quantiser or a trainer could go wrong."""

import pytest
import torch
import transformers

import pyfast
from pyfast import LoraConfig
from pyfast.families import layers_of
from pyfast.methods.targets import linear_modules, output_layers
from pyfast.nn import NF4Linear
from tests.family_models import VARIANTS, batch, outputs, variant

bnb = pytest.importorskip("bitsandbytes")
GEMMAS = [name for name in VARIANTS if "gemma" in name]


@pytest.mark.parametrize("name", GEMMAS)
def test_who_scales_embeddings(name):
    """Gemma's embedding module does, and RecurrentGemma's model: only there virtual tokens are scaled."""
    model = variant(name)
    embedding, ids = model.get_input_embeddings(), batch(model)["input_ids"]
    scale = 1 if name == "recurrent_gemma" else 8
    torch.testing.assert_close(embedding(ids), embedding.weight[ids] * scale)
    hidden = model.model(inputs_embeds=embedding(ids), output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[0], embedding.weight[ids] * 8)


@pytest.mark.parametrize("name", GEMMAS)
def test_an_adapter_of_a_tied_head_leaves_the_embedding(name):
    model = variant(name)
    before = model.get_input_embeddings().weight.clone()
    pyfast.apply(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    expected = outputs(model)
    torch.testing.assert_close(outputs(pyfast.merge(model)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("name", VARIANTS)
def test_quantize_takes_every_linear_but_what_transformers_keeps_in_float32(name):
    model = variant(name)
    linears = set(linear_modules(model)) - output_layers(model)
    kept = {path for path in linears if path.endswith(".wo")}
    assert bool(kept) == model.config.is_encoder_decoder
    pyfast.quantize(model)
    quantised = {path for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert quantised == linears - kept


@pytest.mark.parametrize("name", VARIANTS)
def test_quantize_takes_what_bitsandbytes_takes_and_more(name, tmp_path):
    """Oracle: transformers' loader. It passes over Falcon's linears, which have a class of their own."""
    model = variant(name)
    model.save_pretrained(tmp_path)
    options = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.float32, **options)
    pyfast.quantize(model)
    ours, peers = (
        {path for path, m in each.named_modules() if isinstance(m, kind)}
        for each, kind in ((model, NF4Linear), (theirs, bnb.nn.Linear4bit))
    )
    assert peers == (set() if name.startswith("falcon") else ours)


@pytest.mark.parametrize("source", ["ours", "bitsandbytes"])
def test_merged_weights_of_a_4_bit_gpt2_are_stored_transposed_again(source, tmp_path):
    base = variant("gpt2")
    if source == "ours":
        model = pyfast.quantize(base)
    else:
        base.save_pretrained(tmp_path / "dense")
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": config, "dtype": torch.float32}
        model = type(base).from_pretrained(tmp_path / "dense", **options)
    targets = {"target_modules": ["attn.c_proj"], "init_lora_weights": False}
    pyfast.apply(model, LoraConfig(**targets))
    merged = pyfast.merge(model)
    expected = {
        layer.path: layer.module.attn.c_proj.base_layer.weight.clone() for layer in layers_of(model)
    }
    pyfast.unload(merged).save_pretrained(tmp_path / "merged")
    fresh = type(base).from_pretrained(tmp_path / "merged")
    for layer in layers_of(fresh):
        stored = layer.module.attn.c_proj.weight
        assert torch.equal(stored, expected[layer.path])
        first = base.get_submodule(layer.path).attn.c_proj if source == "bitsandbytes" else None
        if first is not None:
            near, far = ((stored - w).norm() for w in (first.weight, first.weight.T))
            assert near < far
