# SPDX-License-Identifier: Apache-2.0
"""What every holder of adapters can do: name them, switch them, read and fill them; and two kinds of holder
that are no adapted linear: a module trained whole, and adapters beside a module that hooks call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyfast.errors import AdapterStateError, NonFiniteError, UnsupportedError
from pyfast.nn.per_sample import Samples

_SWITCHING = threading.Lock()
# What accelerate writes on a module that it serves; each module has only its own.
_HOOK_MARKS = ("_hf_hook", "_old_forward")


class Switchable(nn.Module):
    """Which adapters a module holds and which are active, and whether adapters take part at all."""

    op = ""
    """The op of `pyfast.ops` that serves it; reports name it."""
    by_sample = False
    """Whether it can take each sample's adapter from `samples`."""
    samples: Samples | None = None
    """The adapter of each sample, in an `adapters_per_sample` block; else those in `active` take part."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []
        self.configs: dict[str, Any] = {}
        """Adapter name to the config that it was made from."""
        self._disabled = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Whoever disabled the original will enable that one, never this copy; so with its samples.
        self.samples = None
        if self._disabled:
            self._disabled = 1
            self.enable()

    def adapter_names(self) -> list[str]:
        """Names of the adapters that it holds."""
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """`(path without the adapter's name, parameter)` of one adapter."""
        raise NotImplementedError

    def file_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """`(key, tensor)` of one adapter as files hold them, where that differs from the parameters."""
        yield from self.adapter_tensors(name)

    def fill(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Take over the values of what `file_tensors` lists."""
        for key, parameter in self.adapter_tensors(name):
            parameter.copy_(values[key])

    def set_active(self, names: list[str]) -> None:
        """Choose the adapters that take part in the forward."""
        held = self.adapter_names()
        self.active = [name for name in names if name in held]

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self.configs.pop(name, None)
        self.active = [active for active in self.active if active != name]

    def check_merge(self, path: str, names: list[str], dtype: torch.dtype | None) -> None:
        """Raise UnsupportedError if adapters that this module at `path` holds cannot be merged."""

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

    def take(self, samples: Samples) -> None:
        """Let each sample have its adapter until `release`.

        Raises:
            AdapterStateError: others have theirs already.
        """
        with _SWITCHING:
            if self.samples is not None:
                raise AdapterStateError(
                    f"adapters_per_sample: the model is inside such a block, of {self.samples.names}; leave "
                    "it first"
                )
            self.samples = samples

    def release(self) -> None:
        """Undo `take`."""
        self.samples = None


class Mergeable(Switchable):
    """Adapters that can be put into frozen weights: into parts of the module `place`."""

    def __init__(self) -> None:
        super().__init__()
        self.merged: list[str] = []
        # What merging (or, while disabled, its undoing) took out of its place, by name. In a dict: a module
        # or parameter held as an attribute would be registered and saved.
        self._aside: dict[str, nn.Module | nn.Parameter] = {}

    def links(self) -> Sequence[Mergeable]:
        """This one and those of other methods inside it, which a merge takes too."""
        return [self]

    def place(self, name: str) -> nn.Module:
        """The module that holds the part of this name."""
        raise NotImplementedError

    def merge(self, names: list[str], dtype: torch.dtype | None) -> None:
        """Put those of the adapters that it holds into the frozen weights."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Put back what `merge` replaced, where the model lies now."""
        self._switch()
        self._aside = {}
        self.merged = []

    def put(self, parts: dict[str, nn.Module | nn.Parameter]) -> None:
        """Put parts in their places and keep what was there aside."""
        self._aside = parts
        self._exchange()

    def _switch(self) -> None:
        if self._aside:
            self._exchange()

    def _exchange(self) -> None:
        """Swap the parts in place and those set aside; nothing is computed, so both stay exact."""
        for name, other in self._aside.items():
            owner = self.place(name)
            now = getattr(owner, name)
            if isinstance(other, nn.Module):
                other.to(now.weight.device)
            else:
                other.data = other.data.to(now.device, now.dtype)
            self._aside[name] = now
            setattr(owner, name, other)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if (self.merged or self._aside) and any(key.startswith(prefix) for key in state_dict):
            raise AdapterStateError(
                f"load_state_dict: adapters {self.merged} are merged into {prefix[:-1]!r}, so that what is "
                "loaded would not take part; call pyfast.unmerge first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_merged(names: list[str], merged: Tensor) -> None:
    """Raise NonFiniteError if a merged weight overflows its dtype."""
    bad = int((~torch.isfinite(merged)).sum())
    if bad:
        raise NonFiniteError(
            f"merging {names} would leave {bad} non-finite values in a {merged.dtype} weight "
            f"{list(merged.shape)}. The model is unchanged"
        )


class SavedModule(Switchable):
    """A module trained whole beside the adapters (`modules_to_save`): the original and copies by name."""

    by_sample = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def add(self, name: str) -> None:
        """Add a trainable copy of the original under an adapter's name."""
        twin = copy.deepcopy(self.original_module)
        self.modules_to_save[name] = twin.requires_grad_(True)

    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
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
        """Forward of the module that serves now, or of each sample's."""
        if self.samples is None or not self.enabled:
            return self.current()(*args, **kwargs)
        y = self.original_module(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(y, Tensor):
            raise UnsupportedError(
                f"adapters_per_sample: {type(self.original_module).__name__}, which is trained whole beside "
                "adapters, has more than one tensor as its input and one as its output; activate one "
                "adapter for all samples with set_adapter"
            )
        copies = self.modules_to_save
        return self.samples.adapted(
            y, copies, lambda name, _, x: copies[name](x).to(y.dtype), *args
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            blank = "active" not in self.__dict__  # pickle or copy is about to fill it
            if blank or name in _HOOK_MARKS:
                raise
            return getattr(self.current(), name)


class Attachment(Switchable):
    """Adapters beside a module: its child of the name `child`, which hooks on the module call.

    The module's class, paths and forward stay as they are. The hooks are functions that find the child of the
    module they are called with, so that copies and replicas have their own.
    """

    child = ""
    no_merge = ""
    """Why it cannot be merged."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []

    def hook(self, owner: nn.Module) -> list[RemovableHandle]:
        """Register the hooks on the module."""
        raise NotImplementedError

    @classmethod
    def at(cls, owner: nn.Module) -> Self:
        """The attachment of a module, made if it has none."""
        held = owner._modules.get(cls.child)
        if isinstance(held, cls):
            return held
        made = cls()
        made.train(owner.training)
        owner.add_module(cls.child, made)
        made._handles = made.hook(owner)
        return made

    def public_path(self, path: str) -> str:
        """Its path as files know it, of the one in the model."""
        return path

    def detach(self, owner: nn.Module) -> None:
        """Take it and its hooks off the module."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        delattr(owner, self.child)

    def check_merge(self, path: str, names: list[str], dtype: torch.dtype | None) -> None:
        held = next(name for name in names if name in self.adapter_names())
        raise UnsupportedError(
            f"merge: adapter {held!r} at {path!r} cannot be merged into weights: {self.no_merge}. Name "
            "the adapters to merge without it. The model is unchanged"
        )
