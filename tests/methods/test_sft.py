# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: what trains, against plain torch."""

import pytest
import torch

import pyfast
from pyfast import SFTConfig
from pyfast.errors import AdapterStateError, ConfigError
from pyfast.methods.state import adapter_configs
from tests.models import gpt2, llama, train


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2])
def test_trains_as_plain_torch(make):
    plain = make()
    model = make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert pyfast.apply(model, SFTConfig()) is model
    assert train(model) == train(plain)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_frozen_modules_stay():
    model = llama()
    pyfast.apply(model, SFTConfig(freeze_modules=["embed_tokens", "layers.0", "lm_head"]))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("model.layers.1.", "model.norm")) for name in wanted)
    assert len(wanted) == 10
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, steps=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (name not in wanted)


def test_saves_the_whole_model(tmp_path):
    model = pyfast.apply(llama(), SFTConfig())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(AdapterStateError, match=r"no adapter\. .*model\.save_pretrained\("):
        pyfast.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_is_no_adapter(tmp_path):
    model = pyfast.apply(llama(), SFTConfig())
    pyfast.apply(model, pyfast.LoraConfig(init_lora_weights=False), adapter_name="x")
    with pytest.raises(AdapterStateError, match=r"no adapter 'default'; the model has \['x'\]"):
        pyfast.merge(model, "default")
    assert set(adapter_configs(model)) == {"x"}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_single_name_and_other_types():
    model = pyfast.apply(llama(), SFTConfig(freeze_modules="lm_head"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"lm_head.weight"}
    for value in (3, 0, ["lm_head", 3]):
        with pytest.raises(
            ConfigError, match=r"freeze_modules=.* must be a name or a list of names"
        ):
            pyfast.apply(model, SFTConfig(freeze_modules=value))
