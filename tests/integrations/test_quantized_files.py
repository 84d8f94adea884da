# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of models with 4-bit layers: transformers loads them through bitsandbytes, or densely."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.nn import NF4Linear
from tests.models import gpt2, llama, logits, randomise

bnb = pytest.importorskip("bitsandbytes")


def load(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def loaded_in_4_bits(directory, **options):
    """A small Llama that bitsandbytes quantised."""
    llama().save_pretrained(directory)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    return load(directory, quantization_config=config, dtype=torch.float32)


def paths(model, kind):
    return {path for path, module in model.named_modules() if isinstance(module, kind)}


def assert_loads(model, directory, four_bits):
    """What transformers makes of the saved model computes the same, with these layers in 4 bits."""
    model.save_pretrained(directory)
    theirs = load(directory)
    assert paths(theirs, bnb.nn.Linear4bit) == four_bits
    assert theirs.dtype == model.dtype
    tolerance = 1e-5 if model.dtype == torch.float32 else 3e-2
    # In eval mode bitsandbytes repacks weights on the CPU and computes in bfloat16.
    assert torch.allclose(logits(theirs.train()), logits(model.train()), atol=tolerance)


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True, bias=True), gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
def test_a_quantised_model(make, dtype, nested, tmp_path):
    model = pyfast.quantize(make().to(dtype), nested=nested)
    assert_loads(model, tmp_path, paths(model, NF4Linear))


def test_other_block_sizes_and_layers_that_stay_dense(tmp_path):
    # bitsandbytes 0.50 misreads blocks longer than a row on the CPU.
    model = pyfast.quantize(llama(hidden_size=128), blocksize=128, skip_modules=["k_proj"])
    pyfast.quantize(model, blocksize=32, nested=False, skip_modules=["1.self_attn.k_proj"])
    four_bits = paths(model, NF4Linear)
    assert len(four_bits) == 13
    assert_loads(model, tmp_path, four_bits)


def test_dense_conv1d_layers(tmp_path):
    model = pyfast.quantize(gpt2(), skip_modules=["c_fc"])
    assert_loads(model, tmp_path, paths(model, NF4Linear))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float32])
def test_another_dtype_after_quantising(cast, tmp_path):
    first = torch.float32 if cast == torch.bfloat16 else torch.bfloat16
    model = pyfast.quantize(llama().to(first)).to(cast)
    assert_loads(model, tmp_path, paths(model, NF4Linear))


def test_copies_and_wrappers(tmp_path):
    model = llama()
    pyfast.quantize(nn.DataParallel(model))
    assert_loads(copy.deepcopy(model), tmp_path, paths(model, NF4Linear))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_adapters_are_saved_without_the_base(tmp_path):
    model = pyfast.apply(pyfast.quantize(llama()), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    pyfast.delete_adapter(model, "default")
    assert_loads(model, tmp_path / "base", paths(model, NF4Linear))


@pytest.mark.parametrize("source", ["ours", "bitsandbytes"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_merged_layers_are_dense(source, targets, tmp_path):
    model = pyfast.quantize(llama()) if source == "ours" else loaded_in_4_bits(tmp_path / "base")
    four_bits = paths(model, (NF4Linear, bnb.nn.Linear4bit))
    randomise(pyfast.apply(model, LoraConfig(target_modules=targets)))
    pyfast.unload(pyfast.merge(model))
    merged = "" if targets == "all-linear" else tuple(targets)
    left = {path for path in four_bits if not path.endswith(merged)}
    assert paths(model, (NF4Linear, bnb.nn.Linear4bit)) == left
    assert_loads(model, tmp_path / "merged", left)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("quantization_config" in written) == bool(left)


def test_the_rest_of_a_model_that_bitsandbytes_quantised(tmp_path):
    model = loaded_in_4_bits(tmp_path / "base", llm_int8_skip_modules=["lm_head", "up_proj"])
    before = model.config.quantization_config
    pyfast.quantize(model)
    assert len(paths(model, NF4Linear)) == 2
    assert_loads(model, tmp_path / "all", paths(model, (NF4Linear, bnb.nn.Linear4bit)))
    assert model.config.quantization_config is before


def test_the_config_of_a_model_in_memory_is_left_alone(tmp_path):
    """Two models may share it, and only files have to say how to read them."""
    model = pyfast.quantize(llama())
    other = transformers.LlamaForCausalLM(model.config).eval()
    model.save_pretrained(tmp_path / "first")
    assert not hasattr(model.config, "quantization_config")
    assert_loads(other, tmp_path / "other", set())
