# SPDX-License-Identifier: Apache-2.0
"""transformers: its `Conv1D` and `FalconLinear` as weight formats, and models whose `save_pretrained` knows
adapters and NF4 layers."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import UnsupportedError
from pyfast.families import family_of
from pyfast.integrations.adapter_file import TRAINING_NAME, WEIGHTS_NAME
from pyfast.integrations.bitsandbytes import quantization_config
from pyfast.integrations.peft import copy_adapter, is_adapter_state, read_adapter, save_adapter
from pyfast.methods.base import adapted_modules, register_adopter, unwrapped
from pyfast.methods.per_sample import samples_copied
from pyfast.methods.state import adapter_configs, merged_adapters, refuse_merged
from pyfast.nn import (
    DENSE_DTYPES,
    DenseWeight,
    NF4Linear,
    Switchable,
    register_dense,
    register_format,
)


def _conv1d_view(module: Any) -> DenseWeight | None:
    if module.weight.dtype not in DENSE_DTYPES:
        return None
    return DenseWeight(module.weight.t(), module.bias)


def _conv1d_of(matrix: Tensor, bias: Tensor | None) -> nn.Module:
    library: Any = sys.modules["transformers.pytorch_utils"]
    out_features, in_features = matrix.shape
    with torch.device("meta"):
        layer: nn.Module = library.Conv1D(out_features, in_features)
    layer.weight = nn.Parameter(matrix.t().contiguous())
    layer.bias = nn.Parameter(matrix.new_zeros(out_features) if bias is None else bias)
    return layer


def _falcon_view(module: Any) -> DenseWeight | None:
    """Its forward differs from that of `nn.Linear`, which it is made of, in rounding alone."""
    if module.weight.dtype not in DENSE_DTYPES or type(module.weight) is not nn.Parameter:
        return None
    return DenseWeight(module.weight, module.bias)


register_format("transformers.pytorch_utils.Conv1D", _conv1d_view)
register_dense("transformers.pytorch_utils.Conv1D", _conv1d_of)
register_format("transformers.models.falcon.modeling_falcon.FalconLinear", _falcon_view)


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    trainable: bool = False,
) -> nn.Module:
    """Add an adapter from PEFT's format to a model, in place, and make it the active one.

    A warning says so where the file was trained on other base weights (dense, or in NF4 of other settings)
    than this model has, and where `trainable` virtual tokens come without the network that made them, so that
    they are trained themselves.

    Where the adapter began with PiSSA its principal part is taken out of the base weights, and what would
    compute with them but without it (`adapters_disabled`, `unload` unmerged, another adapter) is refused.

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
        UnsupportedError: the config sets something that is not served, the model has no values yet, or it
            carries an adapter that began with PiSSA, without which its base is another.
        TargetModuleError: the config's targets match nothing in this model.
        AdapterStateError: the name is taken or not allowed, or adapters are merged.
        AdapterNotFoundError: the directory or a file is missing.
    """
    read_adapter(unwrapped(model), Path(directory), adapter_name, trainable)
    return model


def _adopt(model: nn.Module) -> None:
    """Give a transformers model with adapters or NF4 layers a class whose `save_pretrained` knows them, and
    tell Trainer what the model's loss is where it would guess wrong.

    The class is a subclass of the model's own with the same name, as FSDP2 does it; nothing outside this
    model changes.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return
    family = family_of(model.config.model_type)
    if family is not None and family.own_loss:
        model.accepts_loss_kwargs = False
    elif family is not None and getattr(model, "loss_type", "") is None:
        # What transformers falls back to; by the name alone Trainer knows which labels count.
        model.loss_type = "ForCausalLM"
    changed = any(isinstance(m, (Switchable, NF4Linear)) for m in model.modules())
    if changed and not issubclass(type(model), _ChangedModel):
        model.__class__ = _changed_class(type(model))  # type: ignore[arg-type]


register_adopter(_adopt)


class _ChangedModel:
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
        """Write the adapters in PEFT's format: "default" here, others in folders of their name; without
        adapters the model, 4-bit layers in bitsandbytes' format. A warning says so where adapters are merged,
        whose model is written after `unload`."""
        model: Any = self
        if not adapted_modules(model):
            with _described(model.config, quantization_config(model)):
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
        merged = merged_adapters(model)
        if merged:
            warnings.warn(
                f"save_pretrained writes the adapters of {type(model).__name__} alone, though {merged} are "
                "merged into its weights; call pyfast.unload(model) first to write the merged model",
                stacklevel=2,
            )
        for name in names:
            at_root = len(names) == 1 or name == "default"
            directory = root if at_root else root / name
            save_adapter(model, directory, adapter_name=name)
            if [name] == active and re.fullmatch(r"checkpoint-\d+", root.name):
                training = directory / TRAINING_NAME
                weights = training if training.is_file() else directory / WEIGHTS_NAME
                _link(weights, root / "model.safetensors")

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch, but refused while adapters are merged; a dict with the keys of an adapter's file goes
        to the active adapter."""
        model: Any = self
        refuse_merged(model, "load_state_dict")
        active = _active(model)
        if len(active) == 1 and is_adapter_state(model, active[0], state_dict):
            copy_adapter(model, active[0], state_dict)
            return nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]


@contextlib.contextmanager
def _described(config: Any, quantization: Any) -> Iterator[None]:
    """Let a config carry a `quantization_config`, or none, inside the block. Only files have to say how they
    are read, and models that share the config in memory need not have the same layers."""
    values = vars(config)
    before = values.pop("quantization_config", None)
    if quantization is not None:
        values["quantization_config"] = quantization
    try:
        yield
    finally:
        values.pop("quantization_config", None)
        if before is not None:
            values["quantization_config"] = before


def _active(model: nn.Module) -> list[str]:
    modules = adapted_modules(model).values()
    return list(dict.fromkeys(name for module in modules for name in module.active))


def _link(source: Path, target: Path) -> None:
    """Give the adapter's file the name under which Trainer looks for weights when it resumes or restores
    the best checkpoint: it reads the other name only for PEFT's model class. Symbolic, so that copies of the
    checkpoint hold the adapter once too; a copy only where the file system has no such links."""
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.relative_to(target.parent))
    except OSError:
        shutil.copyfile(source, target)


@cache
def _changed_class(cls: Any) -> type[nn.Module]:
    own = {"__module__": cls.__module__}
    if hasattr(cls, "generate"):
        own["generate"] = _generate(cls.generate)
    changed = type(cls.__name__, (_ChangedModel, cls), own)
    changed.__qualname__ = cls.__qualname__
    return changed


def _generate(original: Callable[..., Any]) -> Any:
    """A model's `generate`, in which prompts that have adapters of their own lend them to their copies."""

    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with samples_copied(self, _prompts(args, kwargs), _copies(self, args, kwargs)):
            return original(self, *args, **kwargs)

    return generate


def _prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many prompts a call of `generate` has; without any it makes one."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    given = (*args[:1], *named, *kwargs.values())
    return next((len(value) for value in given if isinstance(value, Tensor) and value.ndim), 1)


def _copies(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many copies of each prompt a call of `generate` makes."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    numbers = []
    for name in ("num_beams", "num_return_sequences"):
        configs = (
            getattr(config, name, None)
            for config in (given, getattr(model, "generation_config", None))
        )
        numbers.append(next(filter(None, (kwargs.get(name), *configs)), 1))
    return max(numbers)


def _blank(cls: Any) -> Any:
    changed = _changed_class(cls)
    return changed.__new__(changed)
