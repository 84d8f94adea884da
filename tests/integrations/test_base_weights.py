# SPDX-License-Identifier: Apache-2.0
"""An adapter file says on which weights it was trained, and loading says when they are not there."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import IA3Config, LoraConfig, PromptEncoderConfig
from pyfast.integrations.base_weights import check_base, described
from tests.family_models import variant
from tests.models import llama, logits, randomise

ENTRY = "pyfast_base_weights"
WEIGHTS = "adapter_model.safetensors"


def metadata(directory):
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        return file.metadata()


def saved(model, directory):
    pyfast.save_adapter(randomise(pyfast.apply(model, LoraConfig())), directory)
    return model


@pytest.fixture
def qlora(tmp_path):
    saved(pyfast.quantize(llama()), tmp_path / "qlora")
    return tmp_path / "qlora"


def test_trained_on_nf4_loaded_onto_dense(qlora):
    with pytest.warns(UserWarning, match="NF4") as caught:
        loaded = pyfast.load_adapter(llama(), qlora)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"adapter '{qlora}' was trained on an NF4 base (blocksize=64, nested=True), but this "
        "LlamaForCausalLM is dense; call pyfast.quantize(model, blocksize=64, nested=True) on the dense "
        "model before load_adapter for the weights it was trained on"
    )
    assert len(pyfast.adapter_parameters(loaded)) == 8
    # It is said before anything is changed.
    model = llama()
    with pytest.raises(UserWarning, match="NF4"):
        pyfast.load_adapter(model, qlora)
    assert not model.state_dict().keys() - llama().state_dict().keys()


def test_nothing_is_said_where_the_weights_are_those(qlora, tmp_path):
    # Warnings are errors here.
    quantized = pyfast.load_adapter(pyfast.quantize(llama()), qlora)
    dense = saved(llama(), tmp_path / "dense")
    pyfast.load_adapter(llama(), tmp_path / "dense")
    assert json.loads(metadata(qlora)[ENTRY]) == [{"blocksize": 64, "nested": True}]
    assert json.loads(metadata(tmp_path / "dense")[ENTRY]) == []
    assert len(pyfast.adapter_parameters(quantized)) == len(pyfast.adapter_parameters(dense))


OTHERS = {"blocksize": 128, "nested": False}


@pytest.mark.parametrize("make", [llama, lambda: variant("mixtral", intermediate_size=128)])
def test_trained_on_nf4_of_other_settings(make, tmp_path):
    saved(pyfast.quantize(make(), **OTHERS), tmp_path)
    assert json.loads(metadata(tmp_path)[ENTRY]) == [OTHERS]
    pyfast.load_adapter(pyfast.quantize(make(), **OTHERS), tmp_path)  # not a word
    model = pyfast.quantize(make())
    with pytest.warns(UserWarning, match="was trained on") as caught:
        pyfast.load_adapter(model, tmp_path)
    (found,) = caught
    assert found.filename == __file__
    assert str(found.message) == (
        f"adapter '{tmp_path}' was trained on an NF4 base (blocksize=128, nested=False), but this "
        f"{type(model).__name__} has blocksize=64, nested=True; call pyfast.quantize(model, blocksize=128, "
        "nested=False) on the dense model before load_adapter for the weights it was trained on"
    )


def test_trained_on_dense_loaded_onto_nf4(tmp_path):
    saved(llama(), tmp_path)
    with pytest.warns(UserWarning, match="was trained on") as caught:
        pyfast.load_adapter(pyfast.quantize(llama()), tmp_path)
    assert str(caught[0].message) == (
        f"adapter '{tmp_path}' was trained on a dense base, but this LlamaForCausalLM is in NF4 "
        "(blocksize=64, nested=True), whose weights are rounded; load the dense model for the weights it was "
        "trained on"
    )


def test_layers_of_several_settings(tmp_path):
    def mixed():
        model = llama()
        pyfast.quantize(model.model.layers[0], **OTHERS)
        return pyfast.quantize(model)

    saved(mixed(), tmp_path)
    assert json.loads(metadata(tmp_path)[ENTRY]) == [{"blocksize": 64, "nested": True}, OTHERS]
    pyfast.load_adapter(mixed(), tmp_path)
    both = r"\(blocksize=64, nested=True and blocksize=128, nested=False\), but .* pyfast.quantize\(model\)"
    with pytest.warns(UserWarning, match=both):
        pyfast.load_adapter(llama(), tmp_path)


def test_bitsandbytes_layers_have_settings_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    pyfast.quantize(llama(), nested=False).save_pretrained(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    saved(theirs, tmp_path / "a")
    assert json.loads(metadata(tmp_path / "a")[ENTRY]) == [{"blocksize": 64, "nested": False}]
    for module in theirs.modules():  # as bitsandbytes does where its own CPU kernel runs
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None:
            state.packing_format_for_cpu = True
    assert described(theirs) is None
    assert check_base("a", "nf4", theirs) is check_base("a", "[]", theirs) is None


@pytest.mark.parametrize("config", [LoraConfig(), IA3Config(), PromptEncoderConfig()])
def test_files_of_equal_adapters_have_equal_bytes(config, tmp_path):
    """safetensors draws the order of the metadata anew for each file."""
    model = pyfast.apply(pyfast.quantize(llama()), config)
    for index in range(6):
        pyfast.save_adapter(model, tmp_path / str(index))
    for path in (tmp_path / "0").iterdir():
        files = {(tmp_path / str(index) / path.name).read_bytes() for index in range(6)}
        assert len(files) == 1, path.name


@pytest.mark.parametrize("disabled", [False, True])
def test_merging_before_saving_makes_no_difference(disabled, tmp_path):
    model = randomise(pyfast.apply(pyfast.quantize(llama()), LoraConfig()))
    pyfast.merge(model)
    if disabled:
        with pyfast.adapters_disabled(model):
            pyfast.save_adapter(model, tmp_path)
    else:
        pyfast.save_adapter(model, tmp_path)
    assert json.loads(metadata(tmp_path)[ENTRY]) == [{"blocksize": 64, "nested": True}]


def test_merged_scales_are_not_those_of_the_base(tmp_path):
    """IA3 goes into flat scales; the base had nested ones, or had none of its own in the codes' place."""
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = pyfast.apply(pyfast.quantize(llama(), nested=False), config)
    pyfast.save_adapter(model, tmp_path / "before")
    pyfast.save_adapter(pyfast.merge(model), tmp_path / "merged")
    assert metadata(tmp_path / "before") == metadata(tmp_path / "merged")


def test_peft_reads_the_file_without_a_word(qlora):
    theirs = peft.PeftModel.from_pretrained(llama(), qlora)
    with pytest.warns(UserWarning, match="NF4"):
        ours = pyfast.load_adapter(llama(), qlora)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-6)


def test_files_that_do_not_say(qlora):
    """PEFT's own files and older ones."""
    tensors = load_file(qlora / WEIGHTS)
    hostile = ["int3", "{}", "3", "[3]", '[{"blocksize": 64}]', "[" * 100_000]
    hostile += ['[{"blocksize": [], "nested": true}]', '[{"blocksize": true, "nested": 1}]']
    for entry in ({"format": "pt"}, None, *({ENTRY: text} for text in hostile)):
        save_file(tensors, qlora / WEIGHTS, metadata=entry)
        assert len(pyfast.adapter_parameters(pyfast.load_adapter(llama(), qlora))) == 8
    for text, make, said in (
        ("dense", lambda: pyfast.quantize(llama()), False),
        ("nf4", lambda: pyfast.quantize(llama(), **OTHERS), False),
        ("nf4", llama, True),
    ):
        save_file(tensors, qlora / WEIGHTS, metadata={ENTRY: text})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pyfast.load_adapter(make(), qlora)
        assert ["NF4 base, but" in str(found.message) for found in caught] == [True] * said


def test_an_extra_field_in_the_config_would_make_peft_warn(qlora):
    """Why the file's header holds the entry and not the config."""
    path = qlora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_weights": "nf4"}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['base_weights'\]"):
        peft.PeftConfig.from_pretrained(qlora)
