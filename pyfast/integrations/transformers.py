# SPDX-License-Identifier: Apache-2.0
"""transformers: its `Conv1D` as a weight format, and models whose `save_pretrained` writes the adapter."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyfast import methods
from pyfast.errors import UnsupportedError
from pyfast.integrations.adapter_file import PREFIX, WEIGHTS_NAME
from pyfast.integrations.peft import copy_adapter, read_adapter, save_adapter
from pyfast.methods.base import adapted_modules, unwrapped
from pyfast.methods.state import adapter_configs, refuse_merged
from pyfast.nn import DENSE_DTYPES, DenseWeight, register_format


def _conv1d_view(module: Any) -> DenseWeight | None:
    if module.weight.dtype not in DENSE_DTYPES:
        return None
    return DenseWeight(module.weight.t(), module.bias)


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
    not its base, in `save_pretrained`, and so in `Trainer`'s checkpoints. A warning names the modules
    whose tie `modules_to_save` breaks.

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
    adopt(unwrapped(model))
    return model


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    trainable: bool = False,
) -> nn.Module:
    """Add an adapter from PEFT's format to a model, in place, and make it the active one.

    A warning says so where the file was trained on an NF4 base and this one is dense.

    Args:
        model: the base model, or one with other adapters.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: name in this model.
        trainable: whether its parameters require gradients.

    Returns:
        The same model.

    Raises:
        AdapterMismatchError: tensors are missing, unexpected, damaged, of the wrong shape or dtype.
        NonFiniteError: a value is NaN or infinite.
        UnsafeFileError: only a pickle is there, or the file is oversized.
        ConfigError: the config is not JSON, or a field has the wrong type.
        UnsupportedError: the config sets something that is not served, or the model has no values yet.
        TargetModuleError: the config's targets match nothing in this model.
        AdapterStateError: the name is taken or not allowed, or adapters are merged.
        AdapterNotFoundError: the directory or a file is missing.
    """
    bare = unwrapped(model)
    read_adapter(bare, Path(directory), adapter_name, trainable)
    adopt(bare)
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

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """transformers reads this to let gradients reach the inputs under checkpointing and to accept a
        4-bit base in its Trainer."""
        model: Any = self
        return bool(adapted_modules(model)) or model.__dict__.get("_peft_loaded", False)

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, value: bool) -> None:
        # transformers sets it where its own PEFT methods are used after ours were taken off.
        self.__dict__["_peft_loaded"] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and not found by its name, so that pickle and copy must make it again.
        return _blank, (type(self).__mro__[2],), self.__getstate__()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the adapters in PEFT's format: "default" here, others in folders of their name."""
        model: Any = self
        if not adapted_modules(model):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        if kwargs.get("push_to_hub"):
            raise UnsupportedError(
                "save_pretrained(push_to_hub=True) is not served for adapters; save them, then upload the "
                "folder with huggingface_hub.upload_folder"
            )
        if not kwargs.get("is_main_process", True):
            return
        root, names, active = Path(save_directory), adapter_configs(model), _active(model)
        for name in names:
            at_root = len(names) == 1 or name == "default"
            directory = root if at_root else root / name
            save_adapter(model, directory, adapter_name=name)
            if [name] == active and re.fullmatch(r"checkpoint-\d+", root.name):
                _link(directory / WEIGHTS_NAME, root / "model.safetensors")

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch, but refused while adapters are merged; a dict of PEFT's file keys goes to the active
        adapter."""
        model: Any = self
        refuse_merged(model, "load_state_dict")
        active = _active(model)
        if len(active) == 1 and state_dict and all(key.startswith(PREFIX) for key in state_dict):
            copy_adapter(model, active[0], state_dict)
            return nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]


def _active(model: nn.Module) -> list[str]:
    modules = adapted_modules(model).values()
    return list(dict.fromkeys(name for module in modules for name in module.active))


def _link(source: Path, target: Path) -> None:
    """Give the adapter's file the name under which Trainer looks for weights when it resumes or restores
    the best checkpoint: it tells adapters only by PEFT's model class. No bytes are written twice where
    the file system has hard links."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


@cache
def _adapted_class(cls: Any) -> type[nn.Module]:
    adapted = type(cls.__name__, (_AdaptedModel, cls), {"__module__": cls.__module__})
    adapted.__qualname__ = cls.__qualname__
    return adapted


def _blank(cls: Any) -> Any:
    adapted = _adapted_class(cls)
    return adapted.__new__(adapted)
