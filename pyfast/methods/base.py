# SPDX-License-Identifier: Apache-2.0
"""What a method is, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from pyfast.errors import ConfigError, UnsupportedError
from pyfast.nn import AdapterLayer, Attachment, Switchable

Commit = Callable[[], None]


@dataclass
class Plan:
    """What applying a config would do: all checks are passed, nothing is changed yet.

    Attributes:
        shapes: key of the adapter's file, without the method's prefix, to the tensor's shape.
        commit: makes the change.
        warnings: what the user should know before it is made.
        training: the same keys and shapes for the file of what only training needs, where there is one.
        undo: takes back what `commit` changed besides adding the adapter.
    """

    shapes: Mapping[str, tuple[int, ...]]
    commit: Commit
    warnings: tuple[str, ...] = ()
    training: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    undo: Commit = lambda: None


class Method:
    """One fine-tuning method: its config's type, and how it is put into a model and described in files.

    Attributes:
        name: as `pyfast info` prints it.
        config_type: its config dataclass.
        peft_type: the `peft_type` of the configs and files that it reads, PEFT's where PEFT has the method;
            None if it writes no adapter.
        key_prefix: what keys of its files start with.
        own_fields: fields of its config that PEFT does not know; they are kept in the metadata of the
            tensors' file, so that PEFT has nothing to warn of.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[Any]]
    peft_type: ClassVar[str | None] = None
    key_prefix: ClassVar[str] = "base_model.model."
    own_fields: ClassVar[tuple[str, ...]] = ()

    def completed(self, values: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Fields of a config from elsewhere (PEFT's objects, files) and what they mean if left out there."""
        return values

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
        raise NotImplementedError

    def file_tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Key, without the prefix, to tensor of one adapter as its file holds them."""
        return {
            f"{public_path(model, path)}.{key}": tensor
            for path, module in adapted_modules(model).items()
            if adapter_name in module.adapter_names()
            for key, tensor in module.file_tensors(adapter_name)
        }

    def unread_by_peft(self, model: nn.Module, adapter_name: str) -> tuple[str, ...]:
        """Keys of an adapter's file that PEFT passes over without a word, where its method is PEFT's."""
        return ()

    def training_tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """What only training needs, under keys of its own; empty if the adapter's file has it all."""
        return {}

    def fill(self, model: nn.Module, adapter_name: str, values: Mapping[str, Tensor]) -> None:
        """Give an adapter that is in the model the values of `file_tensors` or of `training_tensors`."""
        for path, module in adapted_modules(model).items():
            if adapter_name in module.adapter_names():
                start = f"{public_path(model, path)}."
                found = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
                module.fill(adapter_name, found)

    def fields(self, model: nn.Module, config: Any, adapter_name: str) -> dict[str, Any]:
        """What `adapter_config.json` says of an adapter that the model carries."""
        return {f.name: getattr(config, f.name) for f in fields(config)}


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


def adapted_modules(model: nn.Module) -> dict[str, Switchable]:
    """Path to module for everything in a model that holds adapters; wrappers are no part of paths."""
    return {
        path: module
        for path, module in unwrapped(model).named_modules()
        if isinstance(module, Switchable)
    }


def public_path(model: nn.Module, path: str) -> str:
    """A holder's path as users and files know it: where methods meet on one linear, all have its path."""
    model = unwrapped(model)
    holder = model.get_submodule(path)
    if isinstance(holder, Attachment):
        return holder.public_path(path)
    while path and isinstance(model.get_submodule(outer := path.rpartition(".")[0]), AdapterLayer):
        path = outer
    return path


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
