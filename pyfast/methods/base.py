# SPDX-License-Identifier: Apache-2.0
"""What a method is, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pyfast.errors import ConfigError, UnsupportedError
from pyfast.nn import AdapterLayer, SavedModule

Commit = Callable[[], None]


@dataclass
class Plan:
    """What applying a config would do: all checks are passed, nothing is changed yet.

    Attributes:
        shapes: adapter-file key without the `base_model.model.` prefix to the tensor's shape.
        commit: makes the change.
        warnings: what the user should know before it is made.
    """

    shapes: Mapping[str, tuple[int, ...]]
    commit: Commit
    warnings: tuple[str, ...] = ()


class Method(Protocol):
    """One fine-tuning method.

    Attributes:
        name: as `pyfast info` prints it.
        config_type: its config dataclass.
        peft_type: the `peft_type` of PEFT's configs and files that it reads; None if PEFT has none.
    """

    name: str
    config_type: type[Any]
    peft_type: str | None

    def plan(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        *,
        allow_unmatched: bool,
        autocast_adapter_dtype: bool,
    ) -> Plan:
        """Check the config against the model and prepare the change."""
        ...


METHODS: dict[type[Any], Method] = {}
"""Config type to method."""


def register_method(method: Method) -> None:
    """Add a method to `METHODS`."""
    METHODS[method.config_type] = method


_adopters: list[Callable[[nn.Module], None]] = []


def register_adopter(adopter: Callable[[nn.Module], None]) -> None:
    """Have a function of a higher layer called with every model that was given adapters or NF4 layers."""
    _adopters.append(adopter)


def adopt(model: nn.Module) -> None:
    """Show a model that was changed to all who registered."""
    for adopter in _adopters:
        adopter(model)


def check_model(model: object) -> None:
    """Raise ConfigError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model must be a torch.nn.Module, got {type(model).__name__} {str(model)[:80]!r}; "
            "load it first, for example with transformers' from_pretrained"
        )


_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch that would put their own names into paths and keys.

    Raises:
        ConfigError: `model` is not a module.
    """
    check_model(model)
    for cls in type(model).__mro__:
        inner = _WRAPPERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if inner is not None:
            return unwrapped(model._modules[inner])  # type: ignore[arg-type]
    return model


def refuse_meta(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UnsupportedError if one of the named tensors has no values."""
    for name, tensor in tensors:
        if tensor.is_meta:
            raise UnsupportedError(
                f"{what}: {name!r} lies on the meta device and has no values; load the model's weights "
                "first. Nothing was changed"
            )


def as_names(field: str, value: object) -> list[str]:
    """A name or several as a list; raise ConfigError for anything else."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, Iterable) and not isinstance(names, (bytes, Mapping)):
        names = list(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise ConfigError(f"{field}={value!r} must be a name or a list of names. Nothing was changed")


def adapted_modules(model: nn.Module) -> dict[str, AdapterLayer | SavedModule]:
    """Path to module for every adapted or whole-trained module of a model; wrappers are no part of paths."""
    return {
        path: module
        for path, module in unwrapped(model).named_modules()
        if isinstance(module, (AdapterLayer, SavedModule))
    }


def replace_modules(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `replacement(module)`, where it is not None, in the place of each module below the model.

    It is called once for a module that several names reach, and all of them get the new one. A replaced
    module is not held any longer than its turn.
    """
    parents = [module for module in model.modules() if module._modules]
    made: dict[int, nn.Module | None] = {}
    for parent in parents:
        for name, child in parent._modules.items():
            if child is None:
                continue
            if id(child) not in made:
                made[id(child)] = replacement(child)
            new = made[id(child)]
            if new is not None:
                setattr(parent, name, new)
