# SPDX-License-Identifier: Apache-2.0
"""Linear layers and experts with outputs or inputs scaled by a learned vector (IA3; Liu et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyfast import ops
from pyfast.errors import AdapterMismatchError, QuantizedMergeError
from pyfast.nn.adapter_layer import AdapterLayer, has_hooks
from pyfast.nn.experts import quantized_experts
from pyfast.nn.per_sample import Samples
from pyfast.nn.switchable import Attachment, Mergeable, check_merged
from pyfast.nn.weight import DenseWeight, NF4Weight, weight_of


def _product(vectors: Iterable[Tensor]) -> Tensor | None:
    """The vectors multiplied; None where there are none."""
    product: Tensor | None = None
    for vector in vectors:
        product = vector if product is None else product * vector
    return product


def _frozen_linear(layer: nn.Module) -> DenseWeight | None:
    """The weight of a plain linear layer that nothing watches and that is not trained."""
    if type(layer) is not nn.Linear or has_hooks(layer):
        return None
    weight = weight_of(layer)
    if not isinstance(weight, DenseWeight) or weight.tensor.requires_grad:
        return None
    return weight


class IA3Linear(AdapterLayer):
    """y = l * (W x + bias), or y = W (l * x) + bias for adapters that scale the input.

    The parameter is `ia3_l.<name>`, float32: [N, 1] for the output, [1, K] for the input. One that scales
    only some of the outputs (`rows`) has an element for each of those; files hold ones for the others.
    """

    containers = ("ia3_l",)
    op = "adapter_scale"
    by_sample = True
    packs = True
    rows: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.ia3_l = nn.ParameterDict()
        self.on_input: dict[str, bool] = {}
        self.partial: set[str] = set()
        self.size = 0  # N, of partial adapters
        # Of all of them: which outputs are scaled follows from the model.
        self.register_buffer("rows", None, persistent=False)

    def add(self, name: str, on_input: bool, rows: Tensor | None, ones: bool) -> None:
        """Add an adapter, of ones or of normal numbers."""
        weight = self.base_weight
        size = weight.in_features if on_input else weight.out_features
        if rows is not None:
            self.rows, self.size = rows.to(weight.device), weight.out_features
            self.partial.add(name)
            size = rows.numel()
        make = torch.ones if ones else torch.randn
        self.ia3_l[name] = nn.Parameter(
            make((1, size) if on_input else (size, 1), device=weight.device)
        )
        self.on_input[name] = on_input

    def remove(self, name: str) -> None:
        super().remove(name)
        self.on_input.pop(name, None)
        self.partial.discard(name)

    def vector(self, name: str) -> Tensor:
        """l [N] or [K]."""
        held: Tensor = self.ia3_l[name].flatten()
        if name not in self.partial or self.rows is None:
            return held
        ones = held.new_ones(self.size)
        return ones.index_copy(0, self.rows, held)

    def _product(self, on_input: bool) -> Tensor | None:
        """l of all active adapters together."""
        return _product(self.vector(n) for n in self.active if self.on_input[n] is on_input)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] to [..., N] with every active adapter, or each sample's."""
        if self.samples is not None and self.enabled:
            x = self._scaled(self.samples, x, True)
            return self._scaled(self.samples, self.base_layer(x, *args, **kwargs), False)
        adapted = self.enabled and not self.merged
        inner = self._product(True) if adapted else None
        outer = self._product(False) if adapted else None
        y: Tensor
        if inner is None:
            y = self.base_layer(x, *args, **kwargs)
        elif (weight := _frozen_linear(self.base_layer)) is not None and not (args or kwargs):
            y = ops.scaled_linear(x, weight.tensor, inner, weight.bias)
        else:
            y = self.base_layer(ops.adapter_scale(x, inner), *args, **kwargs)
        return y if outer is None else ops.adapter_scale(y, outer)

    def _scaled(self, samples: Samples, x: Tensor, on_input: bool) -> Tensor:
        """x scaled by each sample's adapter, if it is one for this side of the layer."""
        held = [name for name, side in self.on_input.items() if side is on_input]
        return samples.adapted(
            x, held, lambda name, rows: ops.adapter_scale(rows, self.vector(name))
        )

    def file_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        vector = self.vector(name)
        yield "ia3_l", vector[None] if self.on_input[name] else vector[:, None]

    def fill(self, name: str, values: Mapping[str, Tensor]) -> None:
        found = values["ia3_l"]
        if name in self.partial and self.rows is not None:
            rows = self.rows.to(found.device)
            others = torch.ones(found.shape[0], dtype=torch.bool).index_fill(0, rows.cpu(), False)
            if bool((found.flatten().cpu()[others] != 1).any()):
                raise AdapterMismatchError(
                    f"adapter {name!r} scales queries of a fused layer too, but its config says "
                    "fused_rows='kv'; set it to 'all' there. Nothing was changed"
                )
            found = found[rows]
        self.ia3_l[name].copy_(found)

    def merge_into(self, matrix: Tensor, name: str) -> Tensor:
        """W with its rows, or for the input its columns, scaled."""
        vector = self.vector(name).to(matrix.dtype)
        return matrix * (vector if self.on_input[name] else vector[:, None])

    def merge_bias(self, bias: Tensor, name: str) -> Tensor:
        if self.on_input[name]:
            return bias
        return bias.to(torch.promote_types(bias.dtype, torch.float32)) * self.vector(name)

    def _not_packed(self, weight: NF4Weight, name: str) -> str:
        """Why an NF4 weight cannot take an adapter into its scales; empty if it can."""
        if self.on_input[name]:
            return "it scales inputs, but weights of different inputs share a scale"
        if weight.nested_absmax is not None:
            return "the scales are in 8 bits themselves and would be rounded"
        if weight.in_features % weight.blocksize:
            return (
                f"the scales are of {weight.blocksize} weights each, and those of one output are no "
                f"multiple of it ({weight.in_features})"
            )
        return ""

    def merge_packed(self, weight: NF4Weight, name: str) -> NF4Weight | None:
        if self._not_packed(weight, name):
            return None
        vector = self.vector(name)
        absmax = weight.absmax.view(weight.out_features, -1) * vector[:, None]
        bias = weight.bias
        if bias is not None:
            bias = self.merge_bias(bias, name).to(bias.dtype)
        return replace(weight, absmax=absmax.flatten(), bias=bias)

    def check_merge(self, path: str, names: list[str], dtype: torch.dtype | None) -> None:
        super().check_merge(path, names, dtype)
        weight = self.base_weight
        held = [(at, name) for at in self.links() for name in names if name in at.adapter_names()]
        # Where a layer of another method makes the weight dense, this one's goes into the same.
        if not isinstance(weight, NF4Weight) or dtype or any(at is not self for at, _ in held):
            return
        for _, name in held:
            if reason := self._not_packed(weight, name):
                raise QuantizedMergeError(
                    f"merge: IA3 adapter {name!r} does not fit into the NF4 weight of {path!r}: {reason}. "
                    f"Fix: merge(model, dtype={weight.original_dtype}), which makes such layers dense. The "
                    "model is unchanged"
                )


def _scale_output(activation: nn.Module, _: Any, output: Tensor) -> Tensor:
    held: Any = activation._modules[IA3Activation.child]
    return held.scaled(output)  # type: ignore[no-any-return]


class IA3Activation(Mergeable, Attachment):
    """IA3 beside the activation function of a layer's experts: l * act(gate) * up is what the last projection
    of each expert reads, so that one vector of the MLP's inner size scales the input of all of them.

    The parameter is `ia3_l.<name>` [1, K], float32; files give it the path of the last projection.
    """

    child = "ia3"
    op = "adapter_scale"

    def __init__(self) -> None:
        super().__init__()
        self.ia3_l = nn.ParameterDict()
        # In a tuple, or the experts would be a module inside their own activation function.
        self._experts: tuple[nn.Module, ...] = ()

    def hook(self, owner: nn.Module) -> list[RemovableHandle]:
        return [owner.register_forward_hook(_scale_output)]

    def public_path(self, path: str) -> str:
        return f"{path.rsplit('.', 2)[0]}.{DOWN}"

    def add(self, name: str, experts: nn.Module, ones: bool) -> None:
        """Add an adapter, of ones or of normal numbers."""
        self._experts = (experts,)
        make = torch.ones if ones else torch.randn
        device = next(experts.parameters()).device
        self.ia3_l[name] = nn.Parameter(make((1, inner_size(experts)), device=device))

    def adapter_names(self) -> list[str]:
        return list(self.ia3_l)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        if name in self.ia3_l:
            yield "ia3_l", self.ia3_l[name]

    def remove(self, name: str) -> None:
        super().remove(name)
        if name in self.ia3_l:
            del self.ia3_l[name]

    def scaled(self, inner: Tensor) -> Tensor:
        """Inner activations [..., K] with every active adapter."""
        adapted = self.enabled and not self.merged
        vector = _product(self.ia3_l[n].flatten() for n in self.active) if adapted else None
        return inner if vector is None else ops.adapter_scale(inner, vector)

    def place(self, name: str) -> nn.Module:
        return self._experts[0]

    def merge(self, names: list[str], dtype: torch.dtype | None) -> None:
        weight: nn.Parameter = getattr(self._experts[0], DOWN)
        held = [name for name in names if name in self.ia3_l]
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in held:
            dense = dense * self.ia3_l[name].to(dense.dtype)
        dense = dense.to(weight.dtype)
        check_merged(names, dense)
        self.put({DOWN: nn.Parameter(dense, weight.requires_grad)})
        self.merged = held

    def check_merge(self, path: str, names: list[str], dtype: torch.dtype | None) -> None:
        if DOWN in quantized_experts(self._experts[0]):
            held = next(name for name in names if name in self.ia3_l)
            raise QuantizedMergeError(
                f"merge: IA3 adapter {held!r} does not fit into the NF4 weights of {path!r}: it scales "
                "inputs, but weights of different inputs share a scale. Leave the adapter unmerged. The "
                "model is unchanged"
            )


DOWN = "down_proj"
"""What transformers calls the last projection of experts."""


def inner_size(experts: nn.Module) -> int:
    """K of the last projection of each expert."""
    held = quantized_experts(experts).get(DOWN)
    shape = getattr(experts, DOWN).shape if held is None else held.shape
    return int(shape[-2 if getattr(experts, "is_transposed", False) else -1])
