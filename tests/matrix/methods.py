# SPDX-License-Identifier: Apache-2.0
"""The methods of the matrix test; one joins by one entry in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from torch import nn

import pyfast
from tests.matrix import references
from tests.matrix.references import EXPERTS, RANK
from tests.models import plain


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
        values: what is done to a dense base so that it has the values of a prepared one.
        save, load: write the trained part, and read it into a fresh base.
        oracle_load: makes the reference of a dense base and what `save` wrote; None where there is none.
        neutral: whether an untrained model gives the base's outputs.
        merges: whether `pyfast.merge` applies.
        shake: how far values must be changed to tell a merged model from its base.
        variants: the variants it is for; None for all.
    """

    config: Callable[[], Any]
    oracle: Callable[[nn.Module], nn.Module]
    trains: Callable[[str], bool]
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    values: Callable[[nn.Module], nn.Module] = lambda model: model
    save: Callable[[nn.Module, Path], None] = _save
    load: Callable[[nn.Module, Path], nn.Module] = _load
    oracle_load: Callable[[nn.Module, Path], nn.Module] | None = None
    renamed: Callable[[str], str] = plain
    neutral: bool = True
    merges: bool = True
    shake: float = 0.05
    variants: tuple[str, ...] | None = None


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
        oracle=references.lora,
        trains=lambda name: ".lora_" in name,
        oracle_load=peft.PeftModel.from_pretrained,
    ),
    "QLoRA": Method(
        config=lambda: pyfast.LoraConfig(**RANK),
        oracle=references.lora,
        trains=lambda name: ".lora_" in name,
        prepare=pyfast.quantize,
        values=references.in_four_bits,
        oracle_load=peft.PeftModel.from_pretrained,
    ),
    "LoRA with experts": Method(
        config=lambda: pyfast.LoraConfig(**EXPERTS),
        oracle=references.lora_of_experts,
        trains=lambda name: ".lora_" in name,
        oracle_load=peft.PeftModel.from_pretrained,
        variants=("mixtral",),
    ),
    "QLoRA with experts": Method(
        config=lambda: pyfast.LoraConfig(**EXPERTS),
        oracle=references.lora_of_experts,
        trains=lambda name: ".lora_" in name,
        prepare=pyfast.quantize,
        values=references.in_four_bits,
        oracle_load=peft.PeftModel.from_pretrained,
        merges=False,
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
        oracle=references.prompted,
        trains=lambda name: name.startswith("prompt_encoder."),
        oracle_load=references.prompt_of_file,
        renamed=lambda name: name.removeprefix("peft."),
        neutral=False,
        merges=False,
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
