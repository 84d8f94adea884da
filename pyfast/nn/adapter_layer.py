# SPDX-License-Identifier: Apache-2.0
"""The frame of an adapted module: one frozen base layer and any number of named adapters.

Parameter names are PEFT's: `base_layer.weight`, `lora_A.<adapter>.weight`, and
`original_module` / `modules_to_save.<adapter>` for modules trained whole.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, NonFiniteError
from pyfast.nn.weight import DenseWeight, NF4Weight, Weight, weight_of

_SWITCHING = threading.Lock()
# What accelerate writes on a module that it serves; each module has only its own.
_HOOK_MARKS = ("_hf_hook", "_old_forward")


class Switchable(nn.Module):
    """Which adapters a module holds and which are active, and whether adapters take part at all."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []
        self.configs: dict[str, Any] = {}
        """Adapter name to the config that it was made from."""
        self._disabled = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._disabled:
            # Whoever disabled the original will enable that one, never this copy.
            self._disabled = 1
            self.enable()

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self.configs.pop(name, None)
        self.active = [active for active in self.active if active != name]

    @property
    def enabled(self) -> bool:
        """Whether no `disable` waits for its `enable`."""
        return self._disabled == 0

    def disable(self) -> None:
        """Leave the adapters out until `enable` was called as often as this."""
        with _SWITCHING:
            if self._disabled == 0:
                self._switch()
            self._disabled += 1

    def enable(self) -> None:
        """Undo one `disable`."""
        with _SWITCHING:
            if self._disabled == 1:
                self._switch()
            self._disabled -= 1

    def _switch(self) -> None:
        """What changes with the first `disable` and changes back with the last `enable`."""


class AdapterLayer(Switchable):
    """A base layer with adapters; a method's subclass holds the parameters and the forward.

    A subclass names its containers (ModuleDict or ParameterDict, keyed by adapter) in `containers` and
    implements `delta`.
    """

    containers: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged: list[str] = []
        # What merging (or, while disabled, its undoing) took out of its place. In a list: a module or
        # parameter held as an attribute would be registered and saved.
        self._aside: list[nn.Module | nn.Parameter] = []

    @property
    def base_weight(self) -> Weight:
        """The frozen weight."""
        weight = weight_of(self.base_layer)
        if weight is None:
            raise AdapterStateError(
                f"{type(self.base_layer).__name__} is not a linear layer that can be read; hooks may have "
                "replaced its forward: remove them first"
            )
        return weight

    @property
    def quantized(self) -> bool:
        """Whether the frozen weight is quantised; merging makes no difference."""
        held = [self.base_layer, *self._aside]
        return any(isinstance(m, nn.Module) and isinstance(weight_of(m), NF4Weight) for m in held)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight tensor, for code that asks a linear layer for it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """K."""
        return self.base_weight.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base_weight.out_features

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this layer holds."""
        return list(getattr(self, self.containers[0]))

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """`(container + parameter path without the adapter's name, parameter)` of one adapter."""
        for container in self.containers:
            held = getattr(self, container)
            if name not in held:
                continue
            entry = held[name]
            if isinstance(entry, nn.Parameter):
                yield container, entry
            else:
                for path, parameter in entry.named_parameters():
                    yield f"{container}.{path}", parameter

    def set_active(self, names: list[str]) -> None:
        """Choose the adapters that take part in the forward."""
        self.active = [name for name in names if name in self.adapter_names()]

    def remove(self, name: str) -> None:
        super().remove(name)
        for container in self.containers:
            held = getattr(self, container)
            if name in held:
                del held[name]

    def delta(self, name: str) -> Tensor:
        """What merging the adapter adds to W [N, K], in float32 or wider."""
        raise NotImplementedError

    def merge_into(self, matrix: Tensor, name: str) -> Tensor:
        """W [N, K] with one more adapter in it."""
        return matrix + self.delta(name)

    def merge(self, names: list[str], dtype: torch.dtype | None) -> None:
        """Add the adapters' deltas to the base weight; `unmerge` restores it bit for bit.

        An NF4 base becomes a dense layer of `dtype` (default: the dtype it was quantised from). A tied
        weight is not changed for the module that shares it.

        Raises:
            NonFiniteError: the merged weight overflows its dtype; the layer is unchanged.
        """
        weight = self.base_weight
        dense = weight.dense()
        dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
        for name in names:
            dense = self.merge_into(dense, name)
        dense = dense.to((None if isinstance(weight, DenseWeight) else dtype) or weight.dtype)
        bad = int((~torch.isfinite(dense)).sum())
        if bad:
            raise NonFiniteError(
                f"merging {names} would leave {bad} non-finite values in a {dense.dtype} weight "
                f"{list(dense.shape)}. The model is unchanged"
            )
        if isinstance(weight, DenseWeight):
            target: nn.Parameter = self.base_layer.weight  # type: ignore[assignment]
            stored = dense if weight.tensor is target else dense.t()
            self._aside = [target]
            self.base_layer.weight = nn.Parameter(stored.contiguous(), target.requires_grad)
        else:
            self._aside = [self.base_layer]
            self.base_layer = dense_linear(weight, dense)
        self.merged = list(names)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise AdapterStateError(
                f"load_state_dict: adapters {self.merged} are merged into {prefix[:-1]!r}, so that what is "
                "loaded would not take part; call pyfast.unmerge first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def mergeable(self) -> bool:
        """Whether the base's weight is a parameter of its own, and not made from others before each
        forward (pruning, weight_norm, parametrizations), which would undo a merge."""
        dense = isinstance(self.base_weight, DenseWeight)
        return not dense or "weight" in self.base_layer._parameters

    def unmerge(self) -> None:
        """Put the weight back that `merge` replaced, where the model lies now."""
        self._exchange()
        self._aside, self.merged = [], []

    def _switch(self) -> None:
        if self.merged:
            self._exchange()

    def _exchange(self) -> None:
        """Swap the weight in place and the one set aside; nothing is computed, so both stay exact."""
        other = self._aside[0]
        now: nn.Parameter = self.base_layer.weight  # type: ignore[assignment]
        if isinstance(other, nn.Module):
            self._aside[0], self.base_layer = self.base_layer, other.to(now.device)
        else:
            other.data = other.data.to(now.device, now.dtype)
            self._aside[0], self.base_layer.weight = now, other


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks watch this module itself, or serve it in the place of its forward (offloading)."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def dense_linear(weight: Weight, matrix: Tensor) -> nn.Linear:
    """A frozen `nn.Linear` with W [N, K] = matrix and the weight's bias."""
    layer = nn.Linear(
        weight.in_features, weight.out_features, weight.bias is not None, device="meta"
    )
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    if weight.bias is not None:
        layer.bias = nn.Parameter(weight.bias.detach().to(matrix.dtype), requires_grad=False)
    return layer


class SavedModule(Switchable):
    """A module trained whole beside the adapters (`modules_to_save`): the original and copies by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def add(self, name: str) -> None:
        """Add a trainable copy of the original under an adapter's name."""
        twin = copy.deepcopy(self.original_module)
        self.modules_to_save[name] = twin.requires_grad_(True)

    def adapter_names(self) -> list[str]:
        """Names that have a copy."""
        return list(self.modules_to_save)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """`(parameter path, parameter)` of one copy."""
        if name in self.modules_to_save:
            yield from self.modules_to_save[name].named_parameters()

    def set_active(self, names: list[str]) -> None:
        """The first of the names that has a copy takes part in the forward."""
        self.active = [name for name in names if name in self.modules_to_save][:1]

    def remove(self, name: str) -> None:
        super().remove(name)
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def current(self) -> nn.Module:
        """The module that serves now."""
        if self.enabled and self.active:
            return self.modules_to_save[self.active[0]]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the module that serves now."""
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            blank = "active" not in self.__dict__  # pickle or copy is about to fill it
            if blank or name in _HOOK_MARKS:
                raise
            return getattr(self.current(), name)
