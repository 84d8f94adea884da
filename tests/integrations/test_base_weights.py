# SPDX-License-Identifier: Apache-2.0
"""An adapter file says on which weights it was trained, and loading says when they are not there."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import LoraConfig
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
        f"adapter '{qlora}' was trained on an NF4 base, but this LlamaForCausalLM is dense; call "
        "pyfast.quantize(model) before load_adapter for the weights it was trained on"
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
    pyfast.load_adapter(pyfast.quantize(llama()), tmp_path / "dense")
    assert metadata(qlora)[ENTRY] == "nf4"
    assert metadata(tmp_path / "dense")[ENTRY] == "dense"
    assert len(pyfast.adapter_parameters(quantized)) == len(pyfast.adapter_parameters(dense))


@pytest.mark.parametrize("disabled", [False, True])
def test_merging_before_saving_makes_no_difference(disabled, tmp_path):
    model = randomise(pyfast.apply(pyfast.quantize(llama()), LoraConfig()))
    pyfast.merge(model)
    if disabled:
        with pyfast.adapters_disabled(model):
            pyfast.save_adapter(model, tmp_path)
    else:
        pyfast.save_adapter(model, tmp_path)
    assert metadata(tmp_path)[ENTRY] == "nf4"


def test_peft_reads_the_file_without_a_word(qlora):
    theirs = peft.PeftModel.from_pretrained(llama(), qlora)
    with pytest.warns(UserWarning, match="NF4"):
        ours = pyfast.load_adapter(llama(), qlora)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-6)


def test_files_that_do_not_say(qlora):
    """PEFT's own files and older ones."""
    tensors = load_file(qlora / WEIGHTS)
    for entry in ({"format": "pt"}, None, {ENTRY: "int3"}):
        save_file(tensors, qlora / WEIGHTS, metadata=entry)
        assert len(pyfast.adapter_parameters(pyfast.load_adapter(llama(), qlora))) == 8


def test_an_extra_field_in_the_config_would_make_peft_warn(qlora):
    """Why the file's header holds the entry and not the config."""
    path = qlora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_weights": "nf4"}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['base_weights'\]"):
        peft.PeftConfig.from_pretrained(qlora)
