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


def fail_at(monkeypatch, owner, name, call, error=torch.OutOfMemoryError):
    """Let the given call of a function run out of memory, the earlier ones work."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error(f"call {call}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


def assert_unchanged(model, call, monkeypatch, error=torch.OutOfMemoryError):
    before, expected = fingerprint(model), logits(model)
    objects = [id(module) for module in model.modules()]
    with pytest.raises(error):
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 6, 15])  # one layer is tried before all fourteen
def test_quantize_that_is_interrupted(error, call, monkeypatch):
    model = llama()
    fail_at(monkeypatch, NF4Linear, "from_weight", call, error)
    assert_unchanged(model, lambda: pyfast.quantize(model), monkeypatch, error)
    assert fingerprint(pyfast.quantize(model)) == fingerprint(pyfast.quantize(llama()))


class Memory:
    """A device that holds the dense weights of a model and NF4 weights of so many layers more."""

    def __init__(self, monkeypatch, model, layers):
        linears = [m for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        self.weights = [weakref.ref(module.weight) for module in linears]
        self.full, self.peak = len(linears) + layers / 4, 0
        self.made, self.convert = weakref.WeakSet(), NF4Linear.from_weight
        monkeypatch.setattr(NF4Linear, "from_weight", self.quantise)

    def dense(self):
        return sum(ref() is not None for ref in self.weights)

    def quantise(self, weight, **options):
        now = self.dense() + (len(self.made) + 1) / 4
        if now > self.full:
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, now)
        layer = self.convert(weight, **options)
        self.made.add(layer)
        return layer


@pytest.mark.parametrize("layers", [1, 2, 5, 14])
def test_quantize_wherever_the_dense_model_fits(layers, monkeypatch):
    model, whole = llama(), pyfast.quantize(llama())
    memory = Memory(monkeypatch, model, layers)
    pyfast.quantize(model)
    assert fingerprint(model) == fingerprint(whole)
    assert memory.dense() == 1  # lm_head
    assert memory.peak == memory.full


def test_quantize_where_no_layer_fits(monkeypatch):
    model = llama()
    Memory(monkeypatch, model, 0)
    assert_unchanged(model, lambda: pyfast.quantize(model), monkeypatch)


def test_the_largest_layer_is_tried_first(monkeypatch):
    model, tried, convert = llama(), [], NF4Linear.from_weight

    def trying(weight, **options):
        tried.append(weight)
        return convert(weight, **options)

    monkeypatch.setattr(NF4Linear, "from_weight", trying)
    largest = max(m.weight.numel() for p, m in model.named_modules() if p.endswith("_proj"))
    pyfast.quantize(model)
    assert tried[0].dense().numel() == largest


def test_quantize_that_is_interrupted_without_memory_to_undo_it(monkeypatch):
    model, whole = llama(), pyfast.quantize(llama())
    memory = Memory(monkeypatch, model, 3)
    quantise = memory.quantise

    def interrupted(weight, **options):
        if len(memory.made) == 5:
            raise KeyboardInterrupt
        return quantise(weight, **options)

    monkeypatch.setattr(NF4Linear, "from_weight", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        pyfast.quantize(model)
    assert caught.value.__notes__ == [
        "quantize: 3 of 14 linear layers are NF4 now, since there was no memory to keep their dense weights; "
        "the same call again goes on with the others"
    ]
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 3
    monkeypatch.undo()
    pyfast.quantize(model)
    assert fingerprint(model) == fingerprint(whole)
