# SPDX-License-Identifier: Apache-2.0
"""LoRA on the 3-D parameters of a mixture's experts: for expert e, y = x W_e^T + s (x A_e^T) B_e^T.

Each adapted parameter has a layer around the module of experts, and the layers lie one in the other in the
order of the parameters, the last one outermost: PEFT's form, in which a parameter's place in the nest says
what it is. The outermost layer takes all experts at once where it can (`grouped_experts.py`), else one after
another, those that tokens go to alone; so no W + s B A is made. Without active adapters the module's own
forward serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, QuantizedMergeError, UnsupportedError
from pyfast.nn.adapter_layer import AdapterLayer
from pyfast.nn.embedding import LoraEmbedding
from pyfast.nn.experts import (
    expert_weight,
    experts_forward,
    project,
    projections,
    quantized_experts,
)
from pyfast.nn.grouped_experts import Factors, grouped_forward, why_not
from pyfast.nn.switchable import check_merged
from pyfast.nn.weight import DenseWeight, NF4Weight


class LoraExperts(AdapterLayer):
    """One parameter of a module of experts with adapters.

    `lora_A.<name>.weight` [experts * R, in] holds the experts' A one below the other, `lora_B.<name>.weight`
    [out, R * experts] their B column by column: first that of every expert's rank 0, then 1, and so on.
    """

    containers = ("lora_A", "lora_B")
    op = "lora_linear"

    def __init__(self, base_layer: nn.Module, parameter_name: str, around: int) -> None:
        """`around` is how many layers of other parameters lie around this one."""
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.parameter_name = parameter_name
        self.prefix = "base_layer." * around

    def nest(self) -> Iterator[LoraExperts]:
        """This layer and those inside it."""
        yield self
        if isinstance(self.base_layer, LoraExperts):
            yield from self.base_layer.nest()

    def links(self) -> list[AdapterLayer]:
        """This layer alone: each has a parameter of its own."""
        return [self]

    @property
    def frozen(self) -> nn.Module:
        """The module of experts."""
        *_, innermost = self.nest()
        return innermost.base_layer

    @property
    def base_weight(self) -> DenseWeight | NF4Weight:
        """The first expert's matrix."""
        return expert_weight(self.frozen, self.parameter_name, 0)

    @property
    def quantized(self) -> bool:
        """Whether the parameter is in NF4."""
        return self.parameter_name in quantized_experts(self.frozen)

    def add(self, name: str, rank: int, scale: float, init: bool | str, dtype: torch.dtype) -> None:
        """Add an adapter; see `LoraConfig.init_lora_weights`."""
        experts, out, inner = projections(self.frozen)[self.parameter_name]
        device = self.base_weight.device
        a = nn.Linear(inner, experts * rank, bias=False, device=device, dtype=dtype)
        b = nn.Linear(experts * rank, out, bias=False, device=device, dtype=dtype)
        if init is not False:
            if init == "gaussian":
                nn.init.normal_(a.weight, std=1 / rank)
            else:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
        self.lora_A[name], self.lora_B[name], self.scaling[name] = a, b, scale

    def remove(self, name: str) -> None:
        super().remove(name)
        self.scaling.pop(name, None)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """As the base class, under the path from the outermost layer on, which is the one in files."""
        for key, parameter in super().adapter_tensors(name):
            yield self.prefix + key, parameter

    def factors(self, name: str) -> Factors:
        """An adapter, expert by expert."""
        a: Tensor = self.lora_A[name].weight  # type: ignore[assignment]
        b: Tensor = self.lora_B[name].weight  # type: ignore[assignment]
        experts: int = self.frozen.num_experts  # type: ignore[assignment]
        b = b.view(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
        return a.view(experts, -1, a.shape[1]), b, self.scaling[name]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] to the same, with every active adapter of this layer and those inside it; see
        `experts_forward`."""
        serving = {
            layer.parameter_name: [layer.factors(name) for name in layer.active]
            for layer in self.nest()
            if layer.enabled and layer.active and not layer.merged
        }
        if not serving:
            out: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return out
        self._refuse_hooks()
        if not why_not(self.frozen, hidden_states, serving):
            return grouped_forward(self.frozen, hidden_states, top_k_index, top_k_weights, serving)

        def adapted(name: str, weight: DenseWeight | NF4Weight, index: int, x: Tensor) -> Tensor:
            if name not in serving:
                return project(name, weight, index, x)
            (a, b, scale), *others = serving[name]
            y = weight.lora_linear(x, a[index], b[index], scale, 0.0)
            for a, b, scale in others:
                low = x.to(a.dtype) @ a[index].t() @ b[index].t()
                y = y + (low * scale).to(y.dtype)
            return y

        return experts_forward(
            self.frozen, hidden_states, top_k_index, top_k_weights, project=adapted
        )

    def _refuse_hooks(self) -> None:
        """Raise where what is inside has to be called for its hooks, which it is not."""
        frozen = self.frozen
        for path, tensor in self.named_parameters():
            if tensor.is_meta:
                raise AdapterStateError(
                    f"{path!r} of adapted {type(frozen).__name__} lies on the meta device, where offloading "
                    "keeps what is not in use; leave experts and their adapters on their device"
                )
        for module in (*self.nest(), frozen):
            hooks = module._forward_pre_hooks, module._forward_hooks
            backward = module._backward_pre_hooks, module._backward_hooks
            if module is not self and any((*hooks, *backward)):
                raise UnsupportedError(
                    f"hooks on the {type(module).__name__} inside of adapters would not be called, since "
                    "these compute its experts; put them on the module around it, or disable the adapters"
                )

    def delta(self, name: str) -> Tensor:
        """s B A of all experts in the parameter's layout, in float32 or wider."""
        a, b, scale = self.factors(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        change = (b.to(wide) @ a.to(wide)) * scale
        return change.transpose(1, 2) if self.frozen.is_transposed else change

    def place(self, name: str) -> nn.Module:
        return self.frozen

    def merge(self, names: list[str], dtype: torch.dtype | None) -> None:
        """Put the adapters into the parameter; `unmerge` restores it bit for bit."""
        weight: nn.Parameter = getattr(self.frozen, self.parameter_name)
        held = [name for name in names if name in self.adapter_names()]
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in held:
            dense = dense + self.delta(name)
        dense = dense.to(weight.dtype)
        check_merged(names, dense)
        self.put({self.parameter_name: nn.Parameter(dense.contiguous(), weight.requires_grad)})
        self.merged = held

    def check_merge(self, path: str, names: list[str], dtype: torch.dtype | None) -> None:
        parameter, frozen = f"{path}.{self.parameter_name}", self.frozen
        if self.quantized:
            held = next(name for name in names if name in self.adapter_names())
            raise QuantizedMergeError(
                f"merge: LoRA adapter {held!r} does not fit into the NF4 weights of {parameter!r}: adding a "
                "small update to 4-bit codes would erase it. Leave the adapter unmerged, or merge it into "
                "the dense model. The model is unchanged"
            )
        if self.parameter_name not in frozen._parameters:
            raise UnsupportedError(
                f"merge: {parameter!r} is made anew before each forward (a parametrization), which would "
                "undo the merge; make it permanent first. The model is unchanged"
            )


NOT_LINEAR = (LoraEmbedding, LoraExperts)
"""The adapter layers whose frozen layer is no linear one."""
