# SPDX-License-Identifier: Apache-2.0
"""Things that are no model, models without values, and weights of 8-bit floats."""

import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig, SFTConfig
from pyfast.errors import ConfigError, UnsupportedError
from pyfast.nn import weight_of
from tests.models import fingerprint, gpt2, llama, logits, randomise

CALLS = {
    "apply": lambda model, directory: pyfast.apply(model, LoraConfig()),
    "sft": lambda model, directory: pyfast.apply(model, SFTConfig()),
    "quantize": lambda model, directory: pyfast.quantize(model),
    "load_adapter": pyfast.load_adapter,
    "save_adapter": lambda model, directory: pyfast.save_adapter(model, directory / "new"),
    "merge": lambda model, directory: pyfast.merge(model),
    "unmerge": lambda model, directory: pyfast.unmerge(model),
    "unload": lambda model, directory: pyfast.unload(model),
    "set_adapter": lambda model, directory: pyfast.set_adapter(model, []),
    "delete_adapter": lambda model, directory: pyfast.delete_adapter(model, "default"),
    "adapter_parameters": lambda model, directory: pyfast.adapter_parameters(model),
    "adapters_disabled": lambda model, directory: pyfast.adapters_disabled(model).__enter__(),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    pyfast.save_adapter(randomise(pyfast.apply(llama(), LoraConfig())), path)
    return path


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", None, 3, {}])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model(model, call, directory):
    with pytest.raises(ConfigError) as caught:
        CALLS[call](model, directory)
    assert str(caught.value) == (
        f"[PF018] the model must be a torch.nn.Module, got {type(model).__name__} {str(model)!r}; load "
        "it first, for example with transformers' from_pretrained"
    )
    assert not (directory / "new").exists()


def on_meta():
    with torch.device("meta"):
        return llama()


@pytest.mark.parametrize("call", ["quantize", "load_adapter", "merge", "save_adapter"])
def test_values_are_needed(call, directory):
    model = on_meta()
    if call in ("merge", "save_adapter"):
        pyfast.apply(model, LoraConfig())
    before = [(type(module), vars(module).keys()) for module in model.modules()]
    with pytest.raises(UnsupportedError) as caught:
        CALLS[call](model, directory)
    assert str(caught.value).startswith(f"[PF016] {call}: '")
    assert str(caught.value).endswith(
        "' lies on the meta device and has no values; load the model's weights first. Nothing was changed"
    )
    assert [(type(module), vars(module).keys()) for module in model.modules()] == before
    assert not (directory / "new").exists()


def test_apply_on_the_meta_device():
    """The adapter is there to be filled, as in PEFT: a state dict brings the values."""
    config = LoraConfig(target_modules="all-linear", modules_to_save=["norm"])
    model, full = pyfast.apply(on_meta(), config), randomise(pyfast.apply(llama(), config))
    assert all(p.is_meta for p in pyfast.adapter_parameters(model).values())
    # Buffers that no state dict holds are computed with the model.
    model.model.rotary_emb = full.model.rotary_emb
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(logits(model.eval()), logits(full))


def in_float8(model, path):
    module = model.get_submodule(path)
    module.weight = nn.Parameter(
        module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    return model


@pytest.mark.parametrize(
    ("make", "path", "kind"),
    [
        (llama, "model.layers.1.self_attn.q_proj", "Linear"),
        (gpt2, "transformer.h.1.attn.c_attn", "Conv1D"),
    ],
)
def test_weights_of_eight_bit_floats(make, path, kind):
    model = in_float8(make(), path)
    assert weight_of(model.get_submodule(path)) is None
    before = fingerprint(model)
    calls = [
        lambda: pyfast.apply(model, LoraConfig(target_modules=[path.rpartition(".")[2]])),
        lambda: pyfast.apply(model, LoraConfig(target_modules="all-linear")),
        lambda: pyfast.apply(model, LoraConfig(target_modules=rf".*{path}")),
        lambda: pyfast.quantize(model),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError) as caught:
            call()
        assert str(caught.value) == (
            f"[PF016] '{path}' is a {kind} with a torch.float8_e4m3fn weight, which is not served; load "
            "the model in torch.bfloat16 or in 4 bits. Nothing was changed"
        )
    with pytest.raises(UnsupportedError, match="SFT cannot train quantised weights"):
        pyfast.apply(model, SFTConfig())
    with pytest.raises(UnsupportedError, match="holds quantised weights"):
        pyfast.apply(model, LoraConfig(modules_to_save=[path]))
    assert fingerprint(model) == before


def test_eight_bit_floats_that_are_not_asked_for():
    model = in_float8(llama(), "model.layers.1.self_attn.q_proj")
    pyfast.apply(model, LoraConfig(target_modules=["v_proj"]))
    assert len(pyfast.adapter_parameters(model)) == 4
