# SPDX-License-Identifier: Apache-2.0
"""The frame of an adapted linear: one frozen base layer and any number of named adapters.

Parameter names are PEFT's: `base_layer.weight`, `lora_A.<adapter>.weight`. Where methods meet on one linear,
the base layer of one is the layer of the other; a merge takes all of them, inner ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, UnsupportedError
from pyfast.nn.nf4 import NF4Linear
from pyfast.nn.switchable import Mergeable, check_merged
from pyfast.nn.weight import DenseWeight, NF4Weight, Weight, forward_replaced, weight_of


class AdapterLayer(Mergeable):
    """A base layer with adapters; a method's subclass holds the parameters and the forward.

    A subclass names its containers (ModuleDict or ParameterDict, keyed by adapter) in `containers` and
    implements `delta`.
    """

    containers: tuple[str, ...] = ()
    packs = False
    """Whether a merge may leave an NF4 weight in NF4: see `merge_packed`."""
    taken_by: str | None = None
    """The adapter that holds a part of the frozen weight itself, which is the residual (PiSSA)."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def place(self, name: str) -> nn.Module:
        return self if name == "base_layer" else self.base_layer

    def links(self) -> list[AdapterLayer]:
        """This layer and those of other methods inside it, the innermost last."""
        inner = self.base_layer
        return [self, *(inner.links() if isinstance(inner, AdapterLayer) else ())]

    @property
    def frozen(self) -> nn.Module:
        """The frozen layer inside of all adapters."""
        return self.links()[-1].base_layer

    @property
    def base_weight(self) -> Weight:
        """The frozen weight."""
        weight = weight_of(self.frozen)
        if weight is None:
            raise AdapterStateError(
                f"{type(self.frozen).__name__} is not a linear layer that can be read; hooks may have "
                "replaced its forward: remove them first, or leave this layer out of the offloading. DoRA, "
                "merging and new adapters read the weight itself, which hooks bring for a call only"
            )
        return weight

    @property
    def original(self) -> nn.Module:
        """The frozen layer as it is without what is merged into it."""
        place = self.links()[-1]
        aside = place._aside.get("base_layer") if place.enabled else None
        return aside if isinstance(aside, nn.Module) else place.base_layer

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

    def merge_bias(self, bias: Tensor, name: str) -> Tensor:
        """The bias [N] with one more adapter in it; the same tensor where it does not change."""
        return bias

    def merge_packed(self, weight: NF4Weight, name: str) -> NF4Weight | None:
        """An NF4 weight with one more adapter in its scales, exact but for their rounding; None where only a
        dense weight can hold it."""
        return None

    def merge(self, names: list[str], dtype: torch.dtype | None) -> None:
        """Put the adapters of this layer and those inside it into the frozen weight; `unmerge` restores it
        bit for bit. A tied weight is not changed for the module that shares it.

        An NF4 base keeps its codes if no `dtype` is given and its scales can take all adapters; else it
        becomes a dense layer of `dtype` (default: the dtype it was quantised from).

        Raises:
            NonFiniteError: the merged weight overflows its dtype; the layer is unchanged.
        """
        weight, links = self.base_weight, self.links()
        steps = [(at, n) for at in links[::-1] for n in names if n in at.adapter_names()]
        packed = weight if isinstance(weight, NF4Weight) and dtype is None else None
        for at, name in steps:
            packed = packed and at.merge_packed(packed, name)
        if packed is not None:
            check_merged(names, packed.absmax)
            layer = NF4Linear(packed)
            layer.replaced = source_class(links[-1].base_layer)
            parts: dict[str, nn.Module | nn.Parameter] = {"base_layer": layer}
        else:
            dense, bias = weight.dense(), weight.bias
            dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
            for at, name in steps:
                dense = at.merge_into(dense, name)
                bias = None if bias is None else at.merge_bias(bias, name)
            dense = dense.to((None if isinstance(weight, DenseWeight) else dtype) or weight.dtype)
            check_merged(names, dense)
            parts = _merged_parts(links[-1].base_layer, weight, dense, bias)
        links[-1].put(parts)
        for at, name in steps:
            at.merged.append(name)

    def check_merge(self, path: str, names: list[str], dtype: torch.dtype | None) -> None:
        """Refuse where the frozen weight is no parameter of its own but made from others before each forward
        (pruning, weight_norm, parametrizations), which would undo a merge."""
        if isinstance(self.base_weight, DenseWeight) and "weight" not in self.frozen._parameters:
            raise UnsupportedError(
                f"merge: the weight of {path!r} is made anew before each forward (pruning, weight_norm "
                "or a parametrization), which would undo the merge; make it permanent first, for "
                "example with torch.nn.utils.prune.remove. The model is unchanged"
            )


def _merged_parts(
    base: nn.Module, weight: Weight, dense: Tensor, bias: Tensor | None
) -> dict[str, nn.Module | nn.Parameter]:
    """What takes the place of parts of a base layer: by name its weight and bias, or the layer itself."""
    if not isinstance(weight, DenseWeight):
        return {"base_layer": dense_layer(base, dense, bias)}
    target: nn.Parameter = base.weight  # type: ignore[assignment]
    stored = dense if weight.tensor is target else dense.t()
    parts: dict[str, nn.Module | nn.Parameter] = {
        "weight": nn.Parameter(stored.contiguous(), target.requires_grad)
    }
    old = weight.bias
    if bias is not None and old is not None and bias is not old:
        parts["bias"] = nn.Parameter(bias.to(old.dtype), old.requires_grad)
    return parts


Layer = TypeVar("Layer", bound=AdapterLayer)


def link_of(module: nn.Module, kind: type[Layer]) -> Layer | None:
    """The layer of one method among those of an adapted linear; None if it has none."""
    links = module.links() if isinstance(module, AdapterLayer) else []
    return next((link for link in links if isinstance(link, kind)), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks watch this module itself, or serve it in the place of its forward (offloading)."""
    return bool(
        forward_replaced(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


Maker = Callable[[Tensor, "Tensor | None"], nn.Module]
_makers: dict[str, Maker] = {}


def register_dense(qualified_name: str, make: Maker) -> None:
    """Teach merging a class of dense layers that does not store its weight as `nn.Linear` does.

    Args:
        qualified_name: `module.Class`, so that the library that defines it need not be imported.
        make: gives the layer of a matrix [N, K] and a bias.
    """
    _makers[qualified_name] = make


def dense_layer(base: nn.Module, matrix: Tensor, bias: Tensor | None) -> nn.Module:
    """A frozen dense layer with W [N, K] = matrix and a bias of its dtype, of the kind in whose place a
    quantised layer is."""
    if bias is not None:
        bias = bias.detach().to(matrix.dtype)
    return _makers.get(source_class(base), _linear)(matrix, bias).requires_grad_(False)


def source_class(base: nn.Module) -> str:
    """The qualified name of the class of the layer in whose place a quantised layer is."""
    cls = getattr(base, "source_cls", nn.Linear)  # what transformers notes on bitsandbytes' layers
    return getattr(base, "replaced", "") or f"{cls.__module__}.{cls.__qualname__}"


def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = matrix.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(matrix)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
