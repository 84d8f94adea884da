# SPDX-License-Identifier: Apache-2.0
"""What a method is, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from pyfast.nn import AdapterLayer, SavedModule

Commit = Callable[[], None]


@dataclass
class Plan:
    """What applying a config would do: all checks are passed, nothing is changed yet.

    Attributes:
        shapes: adapter-file key without the `base_model.model.` prefix to the tensor's shape.
        commit: makes the change.
    """

    shapes: Mapping[str, tuple[int, ...]]
    commit: Commit


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


def adapted_modules(model: nn.Module) -> dict[str, AdapterLayer | SavedModule]:
    """Path to module for every adapted or whole-trained module of a model."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (AdapterLayer, SavedModule))
    }


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
