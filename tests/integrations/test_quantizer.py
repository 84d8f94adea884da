# SPDX-License-Identifier: Apache-2.0
"""transformers' `from_pretrained` with our quantizer: dense checkpoints become NF4 as they are read."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

import pyfast
from pyfast.cli.dense import load_dense
from pyfast.errors import (
    ConfigError,
    NonFiniteError,
    QuantStateError,
    TargetModuleError,
    UnsupportedError,
)
from pyfast.integrations import nf4_quantizer
from pyfast.nn import NF4Linear, NF4Tensor
from tests.family_models import variant
from tests.integrations.checkpoints import (
    assert_equal_files,
    assert_equal_states,
    damage,
    dense_counts,
    load,
    load_nf4,
    quantization,
)
from tests.methods.test_ia3 import scatter
from tests.models import llama, logits, token_ids, word_llama

pytest.importorskip("bitsandbytes")

FAMILIES = ["llama", "gpt2", "falcon-7b", "falcon-rw", "mixtral", "t5", "recurrent_gemma"]


# --- dense checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_are_those_of_quantize(name, tmp_path):
    variant(name).save_pretrained(tmp_path)
    model = load_nf4(tmp_path)
    assert_equal_states(model, pyfast.quantize(load(tmp_path)))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training


@pytest.mark.parametrize(
    "options",
    [
        {"nested": False},
        {"blocksize": 128},
        {"skip_modules": ["k_proj", "0.mlp.up_proj"]},
    ],
)
def test_options(options, tmp_path):
    llama(hidden_size=128).save_pretrained(tmp_path)
    model = load_nf4(tmp_path, **options)
    assert_equal_states(model, pyfast.quantize(load(tmp_path), **options))
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is (nn.Linear if "skip_modules" in options else NF4Linear)


def test_the_dtype_that_is_asked_for(tmp_path):
    llama(bias=True).save_pretrained(tmp_path)
    config = pyfast.NF4Config()
    model = load(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert_equal_states(model, pyfast.quantize(load(tmp_path, dtype=torch.bfloat16)))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.original_dtype == layer.bias.dtype == model.dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == torch.float32


def test_bitsandbytes_makes_the_same_bytes(tmp_path):
    llama().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    assert_equal_states(load_nf4(tmp_path), load(tmp_path, quantization_config=config))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_dense_model_is_never_there(name, tmp_path, monkeypatch):
    """While a layer is quantised, no dense weight of an earlier one is held any more."""
    variant(name, num_hidden_layers=4).save_pretrained(tmp_path)
    counts = dense_counts(monkeypatch)
    model = load_nf4(tmp_path)
    assert counts == [1] * sum(isinstance(m, NF4Tensor) for m in model.modules())


def test_a_head_that_the_checkpoint_lacks_stays_dense(tmp_path):
    llama().save_pretrained(tmp_path)
    config = pyfast.NF4Config()
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path, quantization_config=config, num_labels=3)
    assert type(model.score) is nn.Linear
    assert torch.isfinite(model.score.weight).all()
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14


def test_layers_that_the_checkpoint_lacks_are_made_anew_and_biases_zero(tmp_path):
    llama(bias=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("q_proj.bias", "k_proj.weight"):
        del tensors[f"model.layers.0.self_attn.{name}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    attention = load_nf4(tmp_path).model.layers[0].self_attn
    assert torch.equal(attention.q_proj.bias, torch.zeros(64))
    assert type(attention.k_proj) is nn.Linear
    assert torch.isfinite(attention.k_proj.weight).all()


def test_a_shared_layer_stays_shared(tmp_path):
    torch.manual_seed(0)
    model = variant("t5")
    model.save_pretrained(tmp_path)
    loaded = load_nf4(tmp_path)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert type(loaded.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear


# --- what is refused -----------------------------------------------------------------------------


def test_a_weight_that_is_not_finite(tmp_path):
    llama().save_pretrained(tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    damage(tmp_path, key, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(NonFiniteError, match=rf"{key} holds NaN or infinity"):
        load_nf4(tmp_path)


def test_a_weight_of_another_shape(tmp_path):
    llama().save_pretrained(tmp_path)
    damage(tmp_path, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor[:-1].clone())
    with pytest.raises(
        ConfigError, match=r"has shape \[127, 64\] .* and \[128, 64\] by its config"
    ):
        load_nf4(tmp_path)


def test_settings(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(TargetModuleError, match="skip_modules: 'nothing' matches no linear"):
        load_nf4(tmp_path, skip_modules=["nothing"])
    for wrong in ({"blocksize": 63}, {"skip_modules": 3}, {"load_in_4bit": True}):
        with pytest.raises(ConfigError):
            pyfast.NF4Config(**wrong)
    options = {"quantization_config": pyfast.NF4Config()}
    for places in ({"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}, "meta"):
        with pytest.raises(UnsupportedError, match="NF4 layers cannot be offloaded"):
            load(tmp_path, device_map=places, **options)
    with pytest.raises(UnsupportedError, match="is not quantised; only bitsandbytes' NF4 form"):
        pyfast.NF4Config.model_config(tmp_path)


@pytest.fixture
def two_processes(monkeypatch):
    """One of them, whose messages go nowhere."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", ["tp_size", "fsdp_size", "pp_size"])
@pytest.mark.parametrize("stored", ["dense", "nf4"])
def test_parameters_that_are_sharded_over_processes(size, stored, two_processes, tmp_path):
    model, options = llama(), {"distributed_config": DistributedConfig(**{size: 2})}
    if stored == "dense":
        model.save_pretrained(tmp_path)
        options["quantization_config"] = pyfast.NF4Config()
    else:
        pyfast.quantize(model).save_pretrained(tmp_path)
        options["config"] = pyfast.NF4Config.model_config(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"cannot be sharded over processes, .* {size}=2; "):
        load(tmp_path, **options)


def test_a_dense_checkpoint_that_says_it_is_ours(tmp_path):
    model = llama()
    model.config.quantization_config = pyfast.NF4Config().to_dict()
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantStateError, match="holds no NF4 weight"):
        load(tmp_path)


# --- registration --------------------------------------------------------------------------------

ORDERS = [
    "import pyfast; from transformers import AutoModelForCausalLM",
    "import transformers; import pyfast",
    "from transformers import LlamaForCausalLM; import pyfast",
    "import pyfast; pyfast.NF4Config",
]


@pytest.mark.parametrize("first", ORDERS)
def test_it_is_registered_whatever_is_imported_first(first):
    code = f"{first}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as them; "
    code += "assert them['pyfast_nf4'] is pyfast.integrations.nf4_quantizer.NF4Quantizer"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_is_not_imported_for_it():
    code = "import sys, pyfast; assert 'transformers' not in sys.modules; dir(pyfast.nn)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyfast.nothing  # noqa: B018


# --- what bitsandbytes has no form for -----------------------------------------------------------


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b", "falcon-rw", "mixtral"])
def test_files_of_our_own(name, tmp_path):
    model = pyfast.quantize(variant(name))
    model.save_pretrained(tmp_path / "first")
    assert quantization(tmp_path / "first")["quant_method"] == "pyfast_nf4"
    loaded = load(tmp_path / "first")
    assert_equal_states(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "second")
    assert_equal_files(tmp_path / "second", tmp_path / "first")
    assert quantization(tmp_path / "second") == quantization(tmp_path / "first")


def test_layers_that_ia3_is_merged_into_stay_of_the_kind_they_were(tmp_path):
    model = pyfast.quantize(variant("falcon-7b"), blocksize=32, nested=False)
    config = pyfast.IA3Config(target_modules="all-linear", feedforward_modules=[])
    scatter(pyfast.apply(model, config))
    pyfast.unload(pyfast.merge(model)).save_pretrained(tmp_path)
    assert quantization(tmp_path)["quant_method"] == "pyfast_nf4"
    loaded = load(tmp_path)
    assert_equal_states(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_linears_beside_experts_are_in_bitsandbytes_form(tmp_path):
    """So that its own loader reads them, if it is told to, and misses nothing but the experts."""
    model = pyfast.quantize(variant("mixtral"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = transformers.AutoModelForCausalLM
    theirs, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.rpartition(".")[2] for key in told["missing_keys"]} == {"gate_up_proj", "down_proj"}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            state = theirs.get_submodule(path).state_dict()
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


# --- training ------------------------------------------------------------------------------------


def trainer(model, directory):
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 10)]
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_trainer_takes_it_with_adapters_and_only_then(name, tmp_path):
    variant(name).save_pretrained(tmp_path / "dense")
    model = load_nf4(tmp_path / "dense")
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(model, tmp_path / "out")
    pyfast.apply(model, pyfast.LoraConfig(target_modules=["q_proj", "v_proj"]))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer(model, tmp_path / "out").train()
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert len(changed) == 8
    assert all("lora_" in key for key in changed)
    names = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names


def test_the_error_of_an_operation_is_the_one_that_is_raised(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. ")

    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(nf4_quantizer, "nf4_linear_of", full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        load_nf4(tmp_path)


# --- back to dense -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rw", "mixtral"])
def test_dequantize_gives_a_plain_model_of_the_same_values(name, tmp_path):
    variant(name).save_pretrained(tmp_path / "first")
    model = load_nf4(tmp_path / "first")
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, NF4Tensor) for module in model.modules())
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "second")
    again = load(tmp_path / "second")
    assert_equal_states(again, model)
    assert type(again) is type(variant(name))


@pytest.mark.parametrize("name", ["falcon-7b", "mixtral"])
def test_our_own_files_are_read_as_dense(name, tmp_path):
    model = pyfast.quantize(variant(name))
    model.save_pretrained(tmp_path / "base")
    word_llama(tmp_path / "words")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "words" / file, tmp_path / "base" / file)
    dense, _ = load_dense(str(tmp_path / "base"), torch.float32)
    assert not any(isinstance(module, NF4Tensor) for module in dense.modules())
    assert torch.allclose(logits(dense), logits(model), atol=1e-5)
