# SPDX-License-Identifier: Apache-2.0
"""IA3's files both ways: PEFT reads ours, we read PEFT's; outputs and gradients equal."""

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import IA3Config
from pyfast.errors import AdapterMismatchError, ConfigError
from pyfast.nn.ia3 import IA3Linear
from tests.family_models import VARIANTS, batch, outputs, variant
from tests.methods.test_ia3 import DENSE, scatter
from tests.models import fingerprint, gpt2, llama, logits, plain, resumed_in_trainer, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
PEFT_DEFAULTS = [
    name
    for name, values in VARIANTS.items()
    if values["model_type"]
    in peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.keys() - {"mixtral"}
]


@pytest.mark.parametrize("name", DENSE)
def test_peft_loads_ours(name, tmp_path):
    ours = scatter(pyfast.apply(variant(name), IA3Config()))
    pyfast.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(variant(name), tmp_path, is_trainable=True)
    torch.testing.assert_close(outputs(ours), outputs(theirs))
    expected = peft.get_peft_model_state_dict(theirs)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == expected.keys() == pyfast.adapter_state_dict(ours).keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    inputs = batch(ours)
    for model in (ours, theirs):
        model(**inputs).loss.backward()
    other = {plain(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for path, layer in ours.named_modules():
        if isinstance(layer, IA3Linear):
            grad = other.pop(f"{path}.ia3_l.default")
            if layer.rows is not None:
                grad = grad[layer.rows]
            torch.testing.assert_close(layer.ia3_l["default"].grad, grad, msg=path)
    assert not other
    back = pyfast.load_adapter(variant(name), tmp_path, trainable=True)
    assert torch.equal(outputs(back), outputs(ours))
    mine = {n: p.shape for n, p in ours.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in back.named_parameters() if p.requires_grad} == mine


@pytest.mark.parametrize("name", PEFT_DEFAULTS)
def test_we_load_pefts(name, tmp_path):
    config = peft.IA3Config(fan_in_fan_out=name == "gpt2")
    theirs = scatter(get_peft_model(variant(name), config))
    theirs.save_pretrained(tmp_path)
    model = pyfast.load_adapter(variant(name), tmp_path, trainable=True)
    torch.testing.assert_close(outputs(model), outputs(theirs))
    mine = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    other = {plain(n): p.shape for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine == other
    pyfast.save_adapter(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], stored[key]) for key in stored)


CASES = {
    "regex": (
        llama,
        {
            "target_modules": r".*\.1\..*(v|down)_proj",
            "feedforward_modules": r".*\.down_proj",
        },
    ),
    "all-linear": (llama, {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}),
    "no feedforward": (llama, {"target_modules": ["k_proj"], "feedforward_modules": []}),
    "saved": (llama, {"modules_to_save": ["lm_head"]}),
    "one of two c_proj": (
        gpt2,
        {
            "target_modules": ["c_proj"],
            "feedforward_modules": r".*0\.mlp\.c_proj",
            "fan_in_fan_out": True,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_forms_of_targets(case, tmp_path):
    make, options = CASES[case]
    theirs = scatter(get_peft_model(make(), peft.IA3Config(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = pyfast.load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs))
    pyfast.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs))


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "llama"])
def test_training_goes_on_where_it_was_saved(name, tmp_path):
    model = pyfast.apply(variant(name), IA3Config())
    train(model, steps=2)
    pyfast.save_adapter(model, tmp_path)
    again = pyfast.load_adapter(variant(name), tmp_path, trainable=True)
    assert train(again, steps=2) == train(model, steps=2)


def test_file_with_scaled_queries_for_keys_and_values_alone(tmp_path):
    theirs = scatter(get_peft_model(gpt2(), peft.IA3Config(fan_in_fan_out=True)))
    theirs.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fused_rows": "kv"}))
    model = gpt2()
    before = fingerprint(model)
    with pytest.raises(AdapterMismatchError, match="scales queries of a fused layer too"):
        pyfast.load_adapter(model, tmp_path)
    assert fingerprint(model) == before
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fused_rows": 1}))
    with pytest.raises(ConfigError, match="fused_rows"):
        pyfast.load_adapter(model, tmp_path)


def test_file_that_does_not_fit(tmp_path):
    pyfast.save_adapter(pyfast.apply(llama(), IA3Config()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    for changed in (
        {k: v for k, v in tensors.items() if k != key},
        tensors | {key: torch.ones(3, 1)},
    ):
        save_file(changed, file)
        model = llama()
        before = fingerprint(model)
        with pytest.raises(AdapterMismatchError):
            pyfast.load_adapter(model, tmp_path)
        assert fingerprint(model) == before


def test_trainer_saves_and_resumes(tmp_path):
    whole, resumed, losses = resumed_in_trainer(lambda: pyfast.apply(gpt2(), IA3Config()), tmp_path)
    assert losses[0] > losses[3]
    saved = load_file(tmp_path / "a" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], whole[key]) for key in whole)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
