# SPDX-License-Identifier: Apache-2.0
"""Making merged layers NF4 again, which is refused where it would erase what was merged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, QuantizedMergeError
from pyfast.methods.base import adapted_modules
from pyfast.nn import AdapterLayer, NF4Linear, NF4Weight, Weight, weight_of
from pyfast.nn.adapter_layer import source_class
from pyfast.nn.nf4 import nf4_of

_LEAST_COSINE = 0.99


@dataclass
class _Damage:
    """What rounding to NF4 leaves of updates, over all layers."""

    product: float = 0.0
    update: float = 0.0
    kept: float = 0.0
    weight: float = 0.0

    def add(self, before: Tensor, merged: Tensor, after: Tensor) -> None:
        update, kept = merged - before, after - before
        self.product += float((update * kept).sum(dtype=torch.float64))
        for name, tensor in (("update", update), ("kept", kept), ("weight", before)):
            setattr(
                self, name, getattr(self, name) + float(tensor.square().sum(dtype=torch.float64))
            )

    @property
    def cosine(self) -> float:
        """Between the merged update and what is left of it; 1 where there is no update."""
        if not self.update:
            return 1.0
        return self.product / (self.update * self.kept) ** 0.5 if self.kept else 0.0

    @property
    def share(self) -> float:
        """Size of the update relative to the weights."""
        return (self.update / self.weight) ** 0.5 if self.weight else 0.0


def requantize(model: nn.Module, *, force: bool = False) -> nn.Module:
    """Make NF4 again what `merge` made dense, with the block size and scales that each layer had.

    A block's 16 values lie further apart than most updates reach, so rounding to them mostly undoes a merge.
    The damage is measured over all layers: the cosine between the update that was merged and what is left of
    it. `unmerge` still restores the base bit for bit.

    Args:
        model: a model with adapters merged into NF4 layers.
        force: do it whatever is left.

    Returns:
        The same model.

    Raises:
        QuantizedMergeError: less than a cosine of 0.99 would be left; the model is unchanged.
        AdapterStateError: no layer was NF4 before a merge made it dense.
    """
    places, damage, names = [], _Damage(), list[str]()
    with torch.no_grad():
        for module in adapted_modules(model).values():
            held = _merged_from_nf4(module) if isinstance(module, AdapterLayer) else None
            if held is None:
                continue
            inner, base, dense = held
            nested = base.nested_absmax is not None
            made = nf4_of(dense.dense(), blocksize=base.blocksize, nested=nested)
            values = [weight.dense(torch.float32) for weight in (base, dense, made)]
            damage.add(*values)
            names += inner.merged
            places.append((inner, replace(made, bias=dense.bias)))
    if not places:
        raise AdapterStateError("requantize: no adapter is merged into a layer that was NF4")
    if damage.cosine < _LEAST_COSINE and not force:
        merged = ", ".join(repr(name) for name in dict.fromkeys(names))
        raise QuantizedMergeError(
            f"requantize: rounding {merged} to NF4 would erase it: over {len(places)} layers the merged "
            f"update keeps cosine {damage.cosine:.2f} with the trained one (the update is {damage.share:.1%} "
            "of the weights, below the 4-bit step). The model is unchanged. Fix: keep the merged layers "
            "dense, or keep the adapter separate; force=True rounds all the same"
        )
    for inner, weight in places:
        layer = NF4Linear(weight)
        layer.replaced = source_class(inner._aside["base_layer"])  # type: ignore[arg-type]
        inner.base_layer = layer.train(inner.training)
    return model


def _merged_from_nf4(layer: AdapterLayer) -> tuple[AdapterLayer, NF4Weight, Weight] | None:
    """The innermost of a layer's adapters, the NF4 weight that merging took out of its place, and the dense
    one there now."""
    inner, now = layer.links()[-1], weight_of(layer.frozen)
    aside = inner._aside.get("base_layer")
    base = weight_of(aside) if isinstance(aside, nn.Module) else None
    if layer is not inner or now is None or isinstance(now, NF4Weight):
        return None
    return (inner, base, now) if isinstance(base, NF4Weight) else None
