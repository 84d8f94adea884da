# SPDX-License-Identifier: Apache-2.0
"""Models inside torch's wrappers, and adapters applied through another part of the same model."""

import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterStateError
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear
from tests.models import fingerprint, llama, logits, randomise, token_ids

CONFIG = LoraConfig(target_modules="all-linear")


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=[compiled, nn.DataParallel, nn.parallel.DistributedDataParallel])
def wrap(request, group):
    return request.param


def test_saved_through_a_wrapper_and_loaded_without(wrap, tmp_path):
    model = randomise(pyfast.apply(llama(), CONFIG))
    outer = wrap(model)
    pyfast.save_adapter(outer, tmp_path)
    assert pyfast.adapter_state_dict(outer).keys() == pyfast.adapter_state_dict(model).keys()
    bare = pyfast.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(bare), logits(model))


def test_applied_and_loaded_through_a_wrapper(wrap, tmp_path):
    plain = randomise(pyfast.apply(llama(), CONFIG))
    pyfast.save_adapter(plain, tmp_path)
    model = llama()
    outer = wrap(model)
    assert pyfast.load_adapter(outer, tmp_path) is outer
    assert torch.equal(logits(model), logits(plain))
    # The output layer is found and spared.
    assert pyfast.apply(outer, CONFIG, adapter_name="b") is outer
    assert isinstance(model.lm_head, nn.Linear)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "b" / "adapter_model.safetensors").is_file()


def test_quantized_through_a_wrapper():
    outer = nn.DataParallel(llama())
    assert pyfast.quantize(outer) is outer
    expected = {p for p, m in pyfast.quantize(llama()).named_modules() if type(m) is NF4Linear}
    found = {p for p, m in outer.module.named_modules() if type(m) is NF4Linear}
    assert found == expected


@pytest.mark.parametrize("first", [lambda m: m.model, lambda m: m])
@pytest.mark.parametrize("second", [lambda m: m.model, lambda m: m, compiled, nn.DataParallel])
def test_an_adapter_is_known_through_every_part_that_holds_it(first, second):
    model = llama()
    randomise(pyfast.apply(first(model), CONFIG))
    before, expected = fingerprint(model), logits(model)
    with pytest.raises(AdapterStateError, match="already has an adapter 'default'"):
        pyfast.apply(second(model), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="before adapters are applied"):
        pyfast.quantize(second(model))
    assert fingerprint(model) == before
    pyfast.merge(second(model))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    pyfast.unload(second(model))
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    pyfast.apply(first(model), CONFIG)
    pyfast.delete_adapter(second(model), "default")
    pyfast.apply(first(model), CONFIG)


def test_one_file_holds_one_config(tmp_path):
    model = llama()
    for layer, alpha in zip(model.model.layers, (8, 16), strict=True):
        pyfast.apply(layer, LoraConfig(target_modules=["q_proj"], lora_alpha=alpha))
    pyfast.save_adapter(model.model.layers[1], tmp_path / "part")
    with pytest.raises(AdapterStateError, match="'default' has another config at"):
        pyfast.save_adapter(model, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_disabled_through_a_wrapper():
    model, base = llama(), logits(llama())
    outer = torch.nn.DataParallel(randomise(pyfast.apply(model, CONFIG)))
    with pyfast.adapters_disabled(outer):
        assert torch.equal(outer(input_ids=token_ids()).logits, base)
    assert not torch.equal(logits(model), base)
