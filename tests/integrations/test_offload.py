# SPDX-License-Identifier: Apache-2.0
"""accelerate's offloading hooks on models that carry adapters: weights leave the layers between calls."""

import accelerate
import peft
import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import UnsupportedError
from tests.family_models import variant
from tests.models import llama, logits, randomise


def cpu(model):
    accelerate.cpu_offload(model, torch.device("cpu"))


def adapters_only(model):
    """Offload what holds adapters; the base stays."""
    for name, module in list(model.named_modules()):
        if "lora_" in name and isinstance(module, nn.Linear):
            accelerate.cpu_offload(module, torch.device("cpu"))


def two(model):
    config = LoraConfig(target_modules="all-linear")
    for name in ("a", "b"):
        pyfast.apply(model, config, adapter_name=name)
    randomise(model)
    pyfast.set_adapter(model, ["a", "b"])
    return model


def theirs(model):
    config = peft.LoraConfig(target_modules="all-linear")
    model = randomise(peft.get_peft_model(model, config))
    pyfast.accelerate(model)
    return model


def whole(model):
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head", "layernorm"])
    return randomise(pyfast.apply(model, config))


MODELS = {
    "ours": lambda: randomise(pyfast.apply(llama(), LoraConfig(target_modules="all-linear"))),
    "two": lambda: two(llama()),
    "nf4": lambda: randomise(
        pyfast.apply(pyfast.quantize(llama()), LoraConfig(target_modules="all-linear"))
    ),
    "saved": lambda: whole(llama()),
    "peft": lambda: theirs(llama()),
}


@pytest.mark.parametrize("offload", [cpu, adapters_only])
@pytest.mark.parametrize("kind", MODELS)
def test_offloaded_after_the_adapters(kind, offload):
    model = MODELS[kind]()
    expected = logits(model)
    offload(model)
    away = {p.device.type for name, p in model.named_parameters() if "lora_A" in name}
    assert away == {"meta"}
    assert torch.allclose(logits(model), expected, atol=1e-5)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_hooks_of_a_wrapper_are_not_those_of_the_module_inside():
    model, seen = MODELS["saved"](), []
    expected = logits(model)
    wrapper = model.lm_head

    class Watching(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(wrapper.current(), Watching())
    assert not hasattr(wrapper, "_hf_hook")
    accelerate.hooks.add_hook_to_module(wrapper, Watching(), append=True)
    assert torch.equal(logits(model), expected)
    assert seen == [wrapper, wrapper.current()]
    accelerate.hooks.remove_hook_from_module(wrapper)
    assert torch.equal(logits(model), expected)
    assert seen[2:] == [wrapper.current()]
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)
    assert len(seen) == 3
    assert not any("_hf_hook" in vars(m) or "_old_forward" in vars(m) for m in model.modules())


def test_hooks_on_an_adapter_run():
    model, seen = MODELS["ours"](), []
    expected = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.lora_B["default"].register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert seen == [(2, 12, 128)]


def test_nf4_experts_are_offloaded_with_the_module_that_reads_them(tmp_path):
    model = pyfast.quantize(variant("mixtral"))
    expected = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"preload_module_classes=\['MixtralExperts'\]"):
        logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    together = {"preload_module_classes": ["MixtralExperts"]}
    accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"), **together)
    assert {p.device.type for name, p in model.named_parameters() if "nf4_" in name} == {"meta"}
    assert torch.allclose(logits(model), expected, atol=1e-5)
