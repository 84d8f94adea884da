# SPDX-License-Identifier: Apache-2.0
"""Models with PEFT's adapters: functions for pyfast's own name what a PeftModel has, and that works."""

import peft
import pytest
import torch

import pyfast
from pyfast.errors import AdapterStateError
from tests.models import fingerprint, llama, logits, randomise, token_ids


def accelerated(config=None):
    model = peft.get_peft_model(
        llama(), config or peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    randomise(model)
    pyfast.accelerate(model)
    return model


def entered(block):
    with block:
        pass


CALLS = {
    "adapter_parameters": (pyfast.adapter_parameters, "peft.get_peft_model_state_dict(model)"),
    "adapter_state_dict": (pyfast.adapter_state_dict, "peft.get_peft_model_state_dict(model)"),
    "adapters_disabled": (
        lambda model: entered(pyfast.adapters_disabled(model)),
        "with model.disable_adapter():",
    ),
    "adapters_per_sample": (
        lambda model: entered(pyfast.adapters_per_sample(model, ["default"])),
        "model(..., adapter_names=[...])",
    ),
    "delete_adapter": (
        lambda model: pyfast.delete_adapter(model, "default"),
        "model.delete_adapter(name)",
    ),
    "merge": (pyfast.merge, "model.merge_adapter()"),
    "save_adapter": (
        lambda model: pyfast.save_adapter(model, "never"),
        "model.save_pretrained(directory)",
    ),
    "set_adapter": (lambda model: pyfast.set_adapter(model, []), "model.set_adapter(name)"),
    "unload": (pyfast.unload, "model.unload(), or model.merge_and_unload()"),
    "unmerge": (pyfast.unmerge, "model.unmerge_adapter()"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_peft_has_is_named(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = accelerated()
    before = fingerprint(model)
    with pytest.raises(AdapterStateError) as caught:
        CALLS[call][0](model)
    assert str(caught.value) == (
        f"[PF017] {call}: the adapters of PeftModel are PEFT's, not pyfast's; a PeftModel has for that: "
        f"{CALLS[call][1]}. Nothing was changed"
    )
    assert fingerprint(model) == before
    assert not list(tmp_path.iterdir())


def test_what_is_named_works(tmp_path):
    model, base = accelerated().eval(), logits(llama())
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    ids = token_ids()
    with torch.no_grad():
        mixed = model(ids, adapter_names=["default", "__base__"]).logits
    assert torch.allclose(mixed, torch.stack([adapted[0], base[1]]), atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(logits(model), adapted, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    ours = pyfast.load_adapter(llama(), tmp_path)
    assert pyfast.adapter_state_dict(ours).keys() == peft.get_peft_model_state_dict(model).keys()
    assert torch.allclose(logits(model.merge_and_unload()), adapted, atol=1e-5)


def test_virtual_tokens_of_peft_are_seen_too():
    """They lie in the PeftModel itself, and no layer of PEFT's is there."""
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(AdapterStateError, match=r"with model\.disable_adapter\(\):"):
        entered(pyfast.adapters_disabled(model))


def test_adapters_beside_those_of_peft_are_still_served():
    inner = accelerated().base_model.model
    expected = logits(inner)
    pyfast.apply(inner, pyfast.PromptEncoderConfig(num_virtual_tokens=3), adapter_name="b")
    with pyfast.adapters_disabled(inner):
        assert torch.equal(logits(inner), expected)
