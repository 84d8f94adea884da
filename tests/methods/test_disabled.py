# SPDX-License-Identifier: Apache-2.0
"""`adapters_disabled` in awkward company: damaged adapters, overlapping blocks, threads, moves."""

import copy
import pickle
import threading

import pytest
import torch

import pyfast
from pyfast import LoraConfig
from pyfast.methods.base import adapted_modules
from pyfast.nn import AdapterLayer
from tests.models import llama, logits, randomise


def quantized():
    return pyfast.quantize(llama())


def adapted(make=llama):
    config = LoraConfig(target_modules="all-linear", modules_to_save=["norm"])
    return randomise(pyfast.apply(make(), config))


def layers(model):
    return [m for m in adapted_modules(model).values() if isinstance(m, AdapterLayer)]


def state(model):
    """What must come back: the tensors bit for bit, and the objects that hold them."""
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    objects = [(layer.base_layer, layer.weight, list(layer.merged)) for layer in layers(model)]
    return tensors, objects


def assert_same(model, before):
    tensors, objects = before
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], t) for key, t in tensors.items())
    for layer, (base, weight, merged) in zip(layers(model), objects, strict=True):
        assert layer.base_layer is base
        assert layer.weight is weight
        assert layer.merged == merged
    assert all(module.enabled for module in adapted_modules(model).values())


@pytest.mark.parametrize("make", [llama, quantized])
@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_damaged_after_the_merge_does_not_matter(make, inside):
    base = logits(make())
    model = adapted(make)
    pyfast.merge(model)
    merged, damaged = logits(model), layers(model)[5].lora_A["default"].weight
    if not inside:
        damaged.data.fill_(float("nan"))
    before = state(model)
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)
        if inside:
            damaged.data.fill_(float("nan"))
    damaged.data.zero_()
    before[0].update({k: v for k, v in model.state_dict().items() if "lora_" in k})
    assert_same(model, before)
    assert torch.equal(logits(model), merged)
    pyfast.unmerge(model)


@pytest.mark.parametrize("merged", [False, True])
def test_blocks_left_out_of_order(merged):
    base = logits(llama())
    model = adapted()
    if merged:
        pyfast.merge(model)
    before, expected = state(model), logits(model)
    first, second = pyfast.adapters_disabled(model), pyfast.adapters_disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), base)
    with pytest.raises(pyfast.errors.AdapterStateError):
        pyfast.unmerge(model)
    second.__exit__(None, None, None)
    assert_same(model, before)
    assert torch.equal(logits(model), expected)


def test_a_block_over_a_part_of_the_model():
    model = adapted()
    pyfast.merge(model)
    before = state(model)
    with pyfast.adapters_disabled(model.model.layers[0]):
        assert model.model.layers[1].mlp.up_proj.enabled
        with pyfast.adapters_disabled(model):
            pass
        assert not model.model.layers[0].mlp.up_proj.enabled
        assert model.model.layers[1].mlp.up_proj.enabled
    assert_same(model, before)


@pytest.mark.parametrize("merged", [False, True])
def test_blocks_in_threads(merged):
    model = adapted()
    if merged:
        pyfast.merge(model)
    before, base = state(model), logits(llama())
    start, failures = threading.Barrier(4), []

    def work():
        start.wait()
        for _ in range(20):
            with pyfast.adapters_disabled(model):
                if any(m.enabled for m in adapted_modules(model).values()):
                    failures.append("enabled inside a block")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_same(model, before)
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("make", [llama, quantized])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_a_block_is_not_disabled_for_good(make, merged, clone):
    model = adapted(make)
    if merged:
        pyfast.merge(model)
    before, expected, base = state(model), logits(model), logits(make())
    with pyfast.adapters_disabled(model), pyfast.adapters_disabled(model):
        other = clone(model)
        assert torch.equal(logits(model), base)
        assert torch.equal(logits(other), expected)
    assert_same(model, before)
    with pyfast.adapters_disabled(other):
        assert torch.equal(logits(other), base)
    assert torch.equal(logits(other), expected)


def test_a_block_that_cannot_be_entered_changes_nothing(monkeypatch):
    model = adapted()
    pyfast.merge(model)
    before = state(model)

    def fail():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(layers(model)[3], "_exchange", fail)
    with pytest.raises(torch.OutOfMemoryError), pyfast.adapters_disabled(model):
        pass
    monkeypatch.undo()
    assert_same(model, before)


@pytest.mark.parametrize("make", [llama, quantized])
def test_a_model_converted_inside_the_block(make):
    model = adapted(make)
    pyfast.merge(model)
    with pyfast.adapters_disabled(model):
        model.double()
    dtypes = {layer.weight.dtype for layer in layers(model)}
    assert dtypes == {torch.float64 if make is llama else torch.float32}
    pyfast.unmerge(model)
