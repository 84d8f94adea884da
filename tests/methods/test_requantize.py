# SPDX-License-Identifier: Apache-2.0
"""Merged layers made NF4 again: refused with the measured damage, which is compared with bitsandbytes'."""

import re

import pytest
import torch

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterStateError, QuantizedMergeError
from pyfast.nn import NF4Linear
from tests.models import fingerprint, gpt2, llama, logits, randomise

bnb = pytest.importorskip("bitsandbytes")

CONFIG = LoraConfig(r=4, target_modules="all-linear")


def merged(std, make=llama):
    model = pyfast.apply(pyfast.quantize(make()), CONFIG)
    return pyfast.merge(randomise(model, std=std))


def round_trip(weight):
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True
    )
    return bnb.functional.dequantize_4bit(packed, state)


def test_a_small_update_would_be_erased():
    base = pyfast.quantize(llama())
    model = merged(0.01)
    updates, kept = [], []
    for path, module in base.named_modules():
        if isinstance(module, NF4Linear):
            before, now = module.dense(), model.get_submodule(path).base_layer.weight
            updates.append((now - before).flatten())
            kept.append((round_trip(now.detach()) - before).flatten())
    expected = torch.nn.functional.cosine_similarity(torch.cat(updates), torch.cat(kept), dim=0)
    assert expected < 0.5
    state = fingerprint(model)
    with pytest.raises(
        QuantizedMergeError, match="'default' to NF4 would erase it: over 14 "
    ) as told:
        pyfast.requantize(model)
    found = re.search(r"cosine (\S+) with .* is (\S+)% of the weights", str(told.value))
    assert float(found[1]) == pytest.approx(float(expected), abs=0.006)
    assert 0 < float(found[2]) < 10
    assert fingerprint(model) == state


@pytest.mark.parametrize("make", [llama, gpt2])
def test_forced_it_is_what_bitsandbytes_makes_of_the_merged_weights(make):
    model = merged(0.05, make)
    wanted = {
        path: round_trip(pyfast.nn.weight_of(module.base_layer).dense().detach())
        for path, module in model.named_modules()
        if hasattr(module, "base_layer")
    }
    pyfast.requantize(model, force=True)
    for path, values in wanted.items():
        layer = model.get_submodule(path).base_layer
        assert isinstance(layer, NF4Linear)
        assert torch.equal(layer.dense(), values)
    with pytest.raises(AdapterStateError, match="no adapter is merged into a layer that was NF4"):
        pyfast.requantize(model)
    logits_merged = logits(model)
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), logits(pyfast.quantize(make())))
    assert torch.equal(logits(model), logits_merged)
    pyfast.unmerge(model)
    other = pyfast.apply(pyfast.quantize(make()), CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_what_is_left_can_be_unloaded_and_saved(tmp_path):
    model = pyfast.requantize(merged(0.05), force=True)
    expected = logits(model)
    pyfast.unload(model).save_pretrained(tmp_path)
    config = pyfast.NF4Config.model_config(tmp_path)
    assert torch.equal(logits(type(llama()).from_pretrained(tmp_path, config=config)), expected)


def test_an_update_that_survives_is_not_refused():
    """Where a weight has few values of its own, as block-wise constant ones have, rounding keeps them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.sign(torch.randn(8, 64)))
    pyfast.apply(pyfast.quantize(model, nested=False), LoraConfig(r=1, target_modules=["0"]))
    with torch.no_grad():
        a, b = (getattr(model[0], name)["default"].weight for name in ("lora_A", "lora_B"))
        a.copy_(model[0].base_layer.dense()[:1])
        b.zero_()[0] = 1.5
    pyfast.requantize(pyfast.merge(model))
    assert isinstance(model[0].base_layer, NF4Linear)
    assert model[0].base_layer.dense()[0].abs().max() > 2


def test_without_a_merge():
    for model in (pyfast.apply(pyfast.quantize(llama()), CONFIG), pyfast.apply(llama(), CONFIG)):
        with pytest.raises(AdapterStateError, match="requantize: no adapter is merged"):
            pyfast.requantize(model)
    with pytest.raises(AdapterStateError):
        pyfast.requantize(pyfast.merge(randomise(model)))
