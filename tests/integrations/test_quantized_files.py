# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of models with 4-bit layers: transformers loads them through bitsandbytes, or densely;
and what bitsandbytes wrote is read without it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import QuantStateError, UnsupportedError
from pyfast.nn import NF4Linear
from tests.family_models import variant
from tests.integrations.checkpoints import (
    assert_equal_files,
    assert_equal_states,
    assert_equal_tensors,
    four_bits,
    load,
    quantization,
    reread,
    written_by_bitsandbytes,
)
from tests.models import gpt2, llama, logits, randomise

bnb = pytest.importorskip("bitsandbytes")


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


# --- read by our quantizer, without bitsandbytes ------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bitsandbytes_comes_in_and_goes_out(name, storage, nested, tmp_path):
    options = {
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": storage,
        "bnb_4bit_compute_dtype": "float32",
    }
    sizes = {"n_inner": 128} if name == "gpt2" else {"intermediate_size": 128}
    source, theirs = written_by_bitsandbytes(tmp_path, variant(name, **sizes), **options)
    ours = reread(source)
    assert four_bits(ours) == four_bits(theirs)
    assert all(m.weight.dtype == torch.uint8 for m in ours.modules() if isinstance(m, NF4Linear))
    # In eval mode bitsandbytes repacks weights on the CPU and computes in bfloat16.
    assert torch.allclose(logits(ours), logits(theirs.train()), atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert_equal_files(tmp_path / "ours", source)
    written, read = quantization(tmp_path / "ours"), quantization(source)
    assert written.pop("llm_int8_skip_modules") == ["lm_head"]
    assert {k: read[k] for k in written} == written
    again = load(tmp_path / "ours")
    assert four_bits(again) == four_bits(theirs)
    assert_equal_states(again, theirs)


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2", "falcon-7b", "mixtral"])
def test_shards(kind, tmp_path):
    """Parts of one weight lie in several files; tied ones are in one."""
    tied = {"tie_word_embeddings": True} if kind == "llama" else {}
    model = pyfast.quantize(variant(kind, **tied))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "ours", max_shard_size="3KB")
    ours = reread(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "again", max_shard_size="3KB")
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for directory in (tmp_path / "ours", tmp_path / "again"):
        files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        assert len(files) > 3
        assert sum(map(len, files)) == len(expected)
        assert_equal_tensors({key: t for file in files for key, t in file.items()}, expected)
        halves = [k for f in files for k in f if k.endswith(".weight") and f"{k}.absmax" not in f]
        assert any(f"{key}.absmax" in expected for key in halves)
    assert_equal_states(ours, model)
    heads = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert heads == bool(model.config.tie_word_embeddings)


def test_half_states_and_bfloat16_around_them(tmp_path):
    """Codes that were made of float16 weights, in a model that computes in bfloat16."""
    source, _ = written_by_bitsandbytes(tmp_path, dtype=torch.float16)
    ours = reread(source, dtype=torch.bfloat16)
    layer = ours.model.layers[0].self_attn.q_proj
    assert (ours.dtype, layer.original_dtype) == (torch.bfloat16, torch.float16)
    assert layer.bias.dtype == ours.model.norm.weight.dtype == torch.bfloat16
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    state = {k.removeprefix("weight."): v for k, v in layer.state_dict().items() if "bias" not in k}
    packed = state.pop("weight")
    theirs.weight = bnb.nn.Params4bit.from_prequantized(packed, state, device="cpu", module=theirs)
    theirs.bias = layer.bias
    assert torch.allclose(layer(x), theirs(x), atol=1e-2)
    assert torch.isfinite(logits(ours)).all()
    ours.save_pretrained(tmp_path / "ours")
    key = "model.layers.0.self_attn.q_proj.weight"
    for name in ("", ".absmax", ".quant_state.bitsandbytes__nf4"):
        wanted = load_file(source / "model.safetensors")[key + name]
        assert torch.equal(load_file(tmp_path / "ours" / "model.safetensors")[key + name], wanted)


def test_rows_that_are_no_multiple_of_a_block(tmp_path):
    """bitsandbytes 0.50 misreads such weights on the CPU, so the values are spelt out here."""
    model = llama(intermediate_size=104)
    dense = model.model.layers[0].mlp.down_proj.weight.data.clone()
    source, _ = written_by_bitsandbytes(tmp_path, model)
    ours = reread(source)
    ours.save_pretrained(tmp_path / "ours")
    assert_equal_files(tmp_path / "ours", source)
    layer = ours.model.layers[0].mlp.down_proj
    packed = layer.weight.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    values = table[codes] * layer.absmax.repeat_interleave(64)[: codes.numel()]
    assert torch.equal(layer.dense(), values.view(64, 104))
    assert (layer.dense() - dense).abs().max() < 0.2 * dense.abs().max()


def test_layers_that_bitsandbytes_left_dense(tmp_path):
    source, theirs = written_by_bitsandbytes(tmp_path, llm_int8_skip_modules=["lm_head", "up_proj"])
    ours = reread(source, dtype=torch.bfloat16)
    assert four_bits(ours) == four_bits(theirs)
    assert ours.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    pyfast.quantize(ours)
    assert len(four_bits(ours)) == 14


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
import pyfast, torch, transformers
source, target = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(
    source, config=pyfast.NF4Config.model_config(source))
model(input_ids=torch.arange(9)[None])
model.save_pretrained(target)
assert not any("bitsandbytes" in name for name in sys.modules if name != "bitsandbytes"
    and not name.startswith(("transformers.", "pyfast.", "accelerate.", "peft.")))
"""


def test_bitsandbytes_is_not_needed(tmp_path):
    source, _ = written_by_bitsandbytes(tmp_path)
    target = tmp_path / "ours"
    subprocess.run([sys.executable, "-c", WITHOUT, str(source), str(target)], check=True)
    assert_equal_files(target, source)


def test_forms_that_are_not_read(tmp_path):
    source, _ = written_by_bitsandbytes(tmp_path, bnb_4bit_quant_type="fp4")
    with pytest.raises(UnsupportedError, match=r"quantised by bitsandbytes; only .* NF4 form"):
        pyfast.NF4Config.model_config(source)
    # A config that lies: the file itself is looked at.
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "nf4"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantStateError, match=r"unknown quantisation keys .*fp4"):
        reread(source)
