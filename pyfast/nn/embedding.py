# SPDX-License-Identifier: Apache-2.0
"""An embedding table with LoRA adapters: y = c (W[i] + s (A^T)[i] B^T) for row i.

c is 1, or the number by which the table's own module multiplies its rows (Gemma's). PEFT's form: dropout has
no part in it, and a padding row of A is never trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyfast.errors import AdapterStateError
from pyfast.nn.adapter_layer import AdapterLayer
from pyfast.nn.weight import DENSE_DTYPES, DenseWeight


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up and does nothing else but multiply them by its own number."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward or _own_scale(module) is not None
    return plain and type(module.weight) is nn.Parameter and module.weight.dtype in DENSE_DTYPES


def _own_scale(module: nn.Module) -> Tensor | None:
    """The number by which an embedding's forward multiplies, as it does so: rounded to the weight's dtype."""
    scale, weight = getattr(module, "embed_scale", None), module.weight
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return scale.to(weight.dtype)  # type: ignore[arg-type]
    if isinstance(scale, (int, float)):
        return torch.tensor(scale, dtype=weight.dtype, device=weight.device)  # type: ignore[arg-type]
    return None


class LoraEmbedding(AdapterLayer):
    """An embedding with adapters; parameters `lora_embedding_A.<name>` [R, rows] and
    `lora_embedding_B.<name>` [width, R]."""

    containers = ("lora_embedding_A", "lora_embedding_B")
    by_sample = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    @property
    def base_weight(self) -> DenseWeight:
        """W [rows, width]."""
        return DenseWeight(self.frozen.weight)  # type: ignore[arg-type]

    def add(self, name: str, rank: int, scale: float, init: bool | str, dtype: torch.dtype) -> None:
        """Add an adapter: A zero and B normal; both normal where `init` is False."""
        rows, width = self.base_weight.tensor.shape
        make = torch.randn if init is False else torch.zeros
        options: dict[str, Any] = {"dtype": dtype, "device": self.base_weight.device}
        self.lora_embedding_A[name] = nn.Parameter(make((rank, rows), **options))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn((width, rank), **options))
        self.scaling[name] = scale

    def remove(self, name: str) -> None:
        super().remove(name)
        self.scaling.pop(name, None)

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows [..., width] of ids [...] with every active adapter, or each sample's."""
        y: Tensor = self.base_layer(ids, *args, **kwargs)
        if not self.enabled or self.merged:
            return y
        dtype = y.dtype
        if self.samples is not None:
            return self.samples.adapted(
                y, self.lora_embedding_A, lambda *rows: self._joined(*rows).to(dtype), ids
            )
        for name in self.active:
            y = self._joined(name, y, ids)
        return y.to(dtype)

    def _joined(self, name: str, y: Tensor, ids: Tensor) -> Tensor:
        """Rows with one more adapter in them."""
        a: Tensor = self.lora_embedding_A[name]
        if a.is_meta:
            raise AdapterStateError(
                f"adapter {name!r} of an embedding lies on the meta device, where offloading keeps what "
                "is not in use; leave adapters on their device"
            )
        frozen = self.frozen
        low = F.embedding(
            ids,
            a.t(),
            padding_idx=frozen.padding_idx,  # type: ignore[arg-type]
            scale_grad_by_freq=frozen.scale_grad_by_freq,  # type: ignore[arg-type]
        )
        addition = low @ self.lora_embedding_B[name].t() * self.scaling[name]
        own = _own_scale(frozen)
        joined: Tensor = y + (addition if own is None else addition * own)
        return joined

    def delta(self, name: str) -> Tensor:
        """s A^T B^T [rows, width] in float32, or float64 where the factors are."""
        a: Tensor = self.lora_embedding_A[name]
        b: Tensor = self.lora_embedding_B[name]
        wide = torch.promote_types(a.dtype, torch.float32)
        return (a.to(wide).t() @ b.to(wide).t()) * self.scaling[name]
