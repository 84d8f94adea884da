# SPDX-License-Identifier: Apache-2.0
"""One module under two names, and one weight in two modules."""

import peft
import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import TargetModuleError
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear, SavedModule
from tests.models import fingerprint, gpt2, llama, logits, randomise


class Shared(nn.Module):
    """A layer that serves twice, once inside a list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.middle = nn.Linear(64, 64)
        self.again = nn.ModuleList([nn.Tanh(), self.first])

    def forward(self, x):
        return self.again[1](self.again[0](self.middle(self.first(x))))


X = torch.linspace(-1, 1, 128).reshape(2, 64)


def test_an_adapter_serves_both_names(tmp_path):
    model = Shared()
    base = model(X)
    pyfast.apply(model, LoraConfig(target_modules="all-linear"))
    assert isinstance(model.first, LoraLinear)
    assert model.again[1] is model.first
    randomise(model)
    keys = [f"{path}.lora_{ab}.weight" for path in ("first", "middle") for ab in "AB"]
    assert sorted(pyfast.adapter_parameters(model)) == sorted(keys)
    pyfast.save_adapter(model, tmp_path)

    # PEFT wraps the first name only; with the second name put right its numbers are ours.
    theirs = peft.PeftModel.from_pretrained(Shared(), tmp_path)
    inner = theirs.base_model.model
    assert inner.again[1] is inner.first.base_layer
    inner.again[1] = inner.first
    expected = theirs(X)
    assert torch.allclose(model(X), expected, atol=1e-6)
    loaded = pyfast.load_adapter(Shared(), tmp_path)
    assert torch.equal(loaded(X), model(X))

    pyfast.merge(model)
    assert torch.allclose(model(X), expected, atol=1e-5)
    pyfast.unmerge(model)
    with pyfast.adapters_disabled(model):
        assert torch.equal(model(X), base)
    pyfast.apply(model, LoraConfig(target_modules=["first"]), adapter_name="b")
    pyfast.delete_adapter(model, "default")
    assert model.again[1] is model.first
    pyfast.delete_adapter(model, "b")
    assert type(model.first) is nn.Linear
    assert model.again[1] is model.first
    assert torch.equal(model(X), base)


def test_unload_and_merged_weights_reach_both_names(tmp_path):
    model = randomise(pyfast.apply(Shared(), LoraConfig(target_modules="all-linear")))
    expected = model(X)
    pyfast.unload(pyfast.merge(model))
    assert type(model.first) is nn.Linear
    assert model.again[1] is model.first
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_quantised_under_both_names():
    model = Shared()
    dense = NF4Linear.from_weight(pyfast.nn.weight_of(model.first)).nf4_weight().dense()
    pyfast.quantize(model)
    assert isinstance(model.first, NF4Linear)
    assert model.again[1] is model.first
    assert torch.equal(model.first.nf4_weight().dense(), dense)


def test_trained_whole_under_both_names():
    model = Shared()
    config = LoraConfig(target_modules=["middle"], modules_to_save=["first"])
    pyfast.apply(model, config)
    assert isinstance(model.first, SavedModule)
    assert model.again[1] is model.first


def test_the_second_name_is_explained():
    model = Shared()
    before = fingerprint(model)
    with pytest.raises(TargetModuleError) as caught:
        pyfast.apply(model, LoraConfig(target_modules=["middle", "again.1"]))
    assert str(caught.value) == (
        "[PF001] target_modules: 'again.1' names 'again.1', which is the same module as 'first'; use "
        "that name, it adapts both. Nothing was changed"
    )
    assert fingerprint(model) == before


TIED = "shares its weight with 'lm_head', but the copy that is trained is no longer tied"


@pytest.mark.parametrize("make", [gpt2, lambda: llama(tied=True)])
def test_a_copy_of_a_tied_embedding_is_announced(make, tmp_path):
    model, before = make(), fingerprint(make())
    path = "transformer.wte" if hasattr(model, "transformer") else "model.embed_tokens"
    config = LoraConfig(modules_to_save=[path.rpartition(".")[2]])
    with pytest.raises(UserWarning, match=TIED):  # warnings are errors here
        pyfast.apply(model, config)
    assert fingerprint(model) == before
    with pytest.warns(UserWarning, match=TIED) as caught:
        pyfast.apply(model, config)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"modules_to_save: '{path}' {TIED}: 'lm_head' will keep the frozen weight. Fix: add 'lm_head' to "
        "modules_to_save too, which trains a copy of its own"
    )
    # What it says is so: the embedding trains, the head keeps the base's weight.
    head = model.lm_head.weight.detach().clone()
    pyfast.save_adapter(randomise(model), tmp_path)
    assert torch.equal(model.lm_head.weight, head)
    # A file says what was trained; there is nothing left to warn of.
    loaded = pyfast.load_adapter(make(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("names", [["lm_head", "wte"], ["ln_f"]])
def test_no_warning_where_no_tie_is_lost(names):  # warnings are errors here
    model = pyfast.apply(gpt2(), LoraConfig(modules_to_save=names))
    assert len(pyfast.adapter_parameters(model)) == 4 + 2


def test_a_head_that_carries_an_adapter_is_named():
    model = pyfast.apply(gpt2(), LoraConfig(target_modules=["lm_head"]))
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"])
    with pytest.warns(UserWarning, match=TIED):
        pyfast.apply(model, config, adapter_name="b")
