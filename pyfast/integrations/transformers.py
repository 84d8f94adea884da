# SPDX-License-Identifier: Apache-2.0
"""transformers: its `Conv1D` as a weight format, and models whose `save_pretrained` writes the adapter."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from pyfast import methods
from pyfast.integrations.peft import save_adapter
from pyfast.methods.apply import adapter_configs
from pyfast.methods.base import adapted_modules
from pyfast.nn import DenseWeight, register_format


def _conv1d_view(module: nn.Module) -> DenseWeight:
    return DenseWeight(module.weight.t(), module.bias)  # type: ignore[arg-type, operator]


register_format("transformers.pytorch_utils.Conv1D", _conv1d_view)


def apply(
    model: nn.Module,
    config: Any,
    *,
    adapter_name: str = "default",
    allow_unmatched: bool = False,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Apply a fine-tuning method to a model, in place, and return the same model.

    Adapter methods freeze the base and add trainable parameters; a second call with another name adds
    another adapter and makes it the active one. A transformers model afterwards saves its adapters,
    not its base, in `save_pretrained`, and so in `Trainer`'s checkpoints.

    Args:
        model: any module tree; for defaults, a transformers model of a known family.
        config: LoraConfig, SFTConfig, or PEFT's config object.
        adapter_name: letters, digits, `_` and `-`.
        allow_unmatched: let single names in `target_modules` match nothing.
        autocast_adapter_dtype: float32 adapters on half-precision weights, as PEFT does.

    Raises:
        TargetModuleError: a name matches nothing.
        ConfigError: a value out of range.
        UnsupportedError: a setting that is not served.
        AdapterStateError: the name is taken or not allowed, or adapters are merged.
    """
    methods.apply(
        model,
        config,
        adapter_name=adapter_name,
        allow_unmatched=allow_unmatched,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    adopt(model)
    return model


def adopt(model: nn.Module) -> None:
    """Give a transformers model with adapters a class whose `save_pretrained` writes the adapters.

    The class is a subclass of the model's own with the same name, as FSDP2 does it; nothing outside this
    model changes.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return
    if adapted_modules(model) and not issubclass(type(model), _AdaptedModel):
        model.__class__ = _adapted_class(type(model))  # type: ignore[arg-type]


class _AdaptedModel:
    """Mixed in front of a transformers model class."""

    # transformers reads this flag to let gradients reach the inputs under checkpointing and to accept a
    # 4-bit base in its Trainer.
    _hf_peft_config_loaded = True

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the adapters in PEFT's format: "default" here, others in folders of their name."""
        model: Any = self
        names = adapter_configs(model)
        if not adapted_modules(model):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        if not kwargs.get("is_main_process", True):
            return
        single = len(names) == 1
        for name in names:
            at_root = single or name == "default"
            directory = Path(save_directory) if at_root else Path(save_directory) / name
            save_adapter(model, directory, adapter_name=name)


@cache
def _adapted_class(cls: Any) -> type[nn.Module]:
    adapted = type(cls.__name__, (_AdaptedModel, cls), {"__module__": cls.__module__})
    adapted.__qualname__ = cls.__qualname__
    return adapted
