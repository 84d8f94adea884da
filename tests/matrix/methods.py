# SPDX-License-Identifier: Apache-2.0
"""The methods of the matrix test; one joins by one entry in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyfast
from pyfast.families import layers_of
from pyfast.nn import NF4Linear, weight_of
from pyfast.nn.experts import quantized_experts
from tests.matrix import references
from tests.models import plain

RANK = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
EXPERTS = RANK | {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def _save(model: nn.Module, directory: Path) -> None:
    pyfast.save_adapter(model, directory)


def _load(base: nn.Module, directory: Path) -> nn.Module:
    return pyfast.load_adapter(base, directory)


@dataclass(frozen=True)
class Method:
    """One column of the matrix.

    Attributes:
        config: makes what `pyfast.apply` gets.
        oracle: makes the reference of a dense base: PEFT's model, or one written in the test; its forward is
            called like the base's.
        renamed: the name of an oracle's parameter to ours.
        trains: whether the method trains the parameter of this name.
        prepare: what is done to a base before `apply`.
        save, load: write the trained part, and read it into a fresh base.
        oracle_load: makes the reference of a dense base and what `save` wrote; None where there is none.
        neutral: whether an untrained model gives the base's outputs.
        merges: whether `pyfast.merge` applies.
        exact: whether float64 models compute in float64.
        shake: how far values must be changed to tell a merged model from its base.
        variants: the variants it is for; None for all.
    """

    config: Callable[[], Any]
    oracle: Callable[[nn.Module], nn.Module]
    trains: Callable[[str], bool]
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    save: Callable[[nn.Module, Path], None] = _save
    load: Callable[[nn.Module, Path], nn.Module] = _load
    oracle_load: Callable[[nn.Module, Path], nn.Module] | None = None
    renamed: Callable[[str], str] = plain
    neutral: bool = True
    merges: bool = True
    exact: bool = True
    shake: float = 0.05
    variants: tuple[str, ...] | None = None


def dequantised(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """The dense model, with the values of the other one where that is in NF4."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, NF4Linear):
                weight_of(fresh.get_submodule(path)).dense().copy_(module.nf4_weight().dense())
            for name, tensor in quantized_experts(module).items():
                fresh.get_submodule(path).get_parameter(name).copy_(tensor.dense())
    return fresh


def _peft_lora(base: nn.Module) -> nn.Module:
    options: dict[str, Any] = dict(RANK)
    if any(layer.family.experts for layer in layers_of(base)):
        # PEFT's "all-linear" takes the router and the experts' 3-D tensors too.
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    return peft.get_peft_model(base, peft.LoraConfig(fan_in_fan_out=transposed, **options))


def _peft_experts(base: nn.Module) -> nn.Module:
    return peft.get_peft_model(base, peft.LoraConfig(**EXPERTS))


def _trainable(base: nn.Module) -> nn.Module:
    return base.requires_grad_()


def _save_whole(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)


def _load_whole(base: Any, directory: Path) -> nn.Module:
    return type(base).from_pretrained(directory)


METHODS: dict[str, Method] = {
    "SFT": Method(
        config=pyfast.SFTConfig,
        oracle=_trainable,
        trains=lambda name: True,
        save=_save_whole,
        load=_load_whole,
        merges=False,
    ),
    "LoRA": Method(
        config=lambda: pyfast.LoraConfig(**RANK),
        oracle=_peft_lora,
        trains=lambda name: ".lora_" in name,
        oracle_load=peft.PeftModel.from_pretrained,
    ),
    "QLoRA": Method(
        config=lambda: pyfast.LoraConfig(**RANK),
        oracle=_peft_lora,
        trains=lambda name: ".lora_" in name,
        prepare=pyfast.quantize,
        oracle_load=peft.PeftModel.from_pretrained,
        exact=False,
    ),
    "LoRA with experts": Method(
        config=lambda: pyfast.LoraConfig(**EXPERTS),
        oracle=_peft_experts,
        trains=lambda name: ".lora_" in name,
        oracle_load=peft.PeftModel.from_pretrained,
        variants=("mixtral",),
    ),
    "QLoRA with experts": Method(
        config=lambda: pyfast.LoraConfig(**EXPERTS),
        oracle=_peft_experts,
        trains=lambda name: ".lora_" in name,
        prepare=pyfast.quantize,
        oracle_load=peft.PeftModel.from_pretrained,
        merges=False,
        exact=False,
        variants=("mixtral",),
    ),
    "IA3": Method(
        config=pyfast.IA3Config,
        oracle=references.ia3,
        trains=lambda name: ".ia3_l." in name,
        oracle_load=references.ia3_of_file,
        renamed=references.ia3_name,
        shake=0.5,
    ),
    "P-tuning": Method(
        config=lambda: pyfast.PromptEncoderConfig(num_virtual_tokens=references.VIRTUAL),
        oracle=references.Prompted,
        trains=lambda name: name.startswith("prompt_encoder."),
        oracle_load=references.prompt_of_file,
        renamed=str,
        neutral=False,
        merges=False,
        exact=False,
    ),
    "Adapters": Method(
        config=lambda: pyfast.BottleneckConfig(bottleneck_size=references.SIZE),
        oracle=references.bottleneck,
        trains=lambda name: ".bottleneck." in name,
        oracle_load=references.bottleneck_of_file,
        renamed=references.bottleneck_name,
        merges=False,
    ),
}
