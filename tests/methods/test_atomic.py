# SPDX-License-Identifier: Apache-2.0
"""A change that fails half way is undone: out of memory in some layer, and the model is as it was."""

import copy
import weakref

import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.nn import NF4Linear
from tests.models import fingerprint, llama, logits, randomise

CONFIG = LoraConfig(target_modules="all-linear", modules_to_save=["norm"])


def fresh():
    return llama()


def trained():
    model = randomise(pyfast.apply(llama(), LoraConfig(target_modules=["q_proj", "v_proj"])))
    pyfast.apply(model, LoraConfig(target_modules=["up_proj"]), adapter_name="other")
    pyfast.set_adapter(model, ["default", "other"])
    return model


def fail_at(monkeypatch, owner, name, call):
    """Let the given call of a function run out of memory, the earlier ones work."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError(f"call {call}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


def assert_unchanged(model, call, monkeypatch):
    before, expected = fingerprint(model), logits(model)
    objects = [id(module) for module in model.modules()]
    with pytest.raises(torch.OutOfMemoryError):
        call()
    monkeypatch.undo()
    assert fingerprint(model) == before
    assert [id(module) for module in model.modules()] == objects
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("make", [fresh, trained])
@pytest.mark.parametrize("call", [1, 2, 7, 28])
def test_apply_that_runs_out_of_memory(make, call, monkeypatch):
    model = make()
    fail_at(monkeypatch, nn.Linear, "__init__", call)
    assert_unchanged(model, lambda: pyfast.apply(model, CONFIG, adapter_name="new"), monkeypatch)
    pyfast.apply(model, CONFIG, adapter_name="new")


@pytest.mark.parametrize("make", [fresh, trained])
@pytest.mark.parametrize("call", [1, 3])
def test_copies_of_whole_modules_that_run_out_of_memory(make, call, monkeypatch):
    model = make()
    config = LoraConfig(target_modules="all-linear", modules_to_save=["layernorm"])
    fail_at(monkeypatch, copy, "deepcopy", call)
    assert_unchanged(model, lambda: pyfast.apply(model, config, adapter_name="new"), monkeypatch)


@pytest.mark.parametrize("make", [fresh, trained])
@pytest.mark.parametrize("call", [1, 9])
def test_loading_that_fails_while_values_are_copied(make, call, monkeypatch, tmp_path):
    pyfast.save_adapter(randomise(pyfast.apply(llama(), CONFIG)), tmp_path)
    model = make()
    fail_at(monkeypatch, torch.Tensor, "copy_", call)
    assert_unchanged(
        model, lambda: pyfast.load_adapter(model, tmp_path, adapter_name="new"), monkeypatch
    )
    pyfast.load_adapter(model, tmp_path, adapter_name="new")


def test_each_dense_weight_is_freed_when_its_layer_is_quantised(monkeypatch):
    model = llama()
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    del linears["lm_head"]
    weights = [weakref.ref(module.weight) for module in linears.values()]
    count, linears = len(linears), None
    alive, convert = [], NF4Linear.from_weight

    def counting(weight, **options):
        alive.append(sum(ref() is not None for ref in weights))
        return convert(weight, **options)

    monkeypatch.setattr(NF4Linear, "from_weight", counting)
    pyfast.quantize(model)
    assert alive == list(range(count, 0, -1))


def test_an_interrupted_quantize_says_so_and_goes_on_when_called_again(monkeypatch):
    model, whole = llama(), pyfast.quantize(llama())
    fail_at(monkeypatch, NF4Linear, "from_weight", 4)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pyfast.quantize(model)
    assert caught.value.__notes__ == [
        "quantize: 3 of 14 linear layers are NF4 now; the same call again goes on with the others"
    ]
    monkeypatch.undo()
    pyfast.quantize(model)
    assert fingerprint(model) == fingerprint(whole)
