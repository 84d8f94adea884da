# SPDX-License-Identifier: Apache-2.0
"""Weight formats: what a linear layer's frozen weight is made of.

A `Weight` is a cheap view of some module's tensors; adapters ask it for products and never look inside.
A new format is one class here and one `register_format` line where its module class is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pyfast import ops


class Weight(ABC):
    """A linear layer's weight W [N, K] and bias [N]."""

    bias: Tensor | None

    @property
    @abstractmethod
    def out_features(self) -> int:
        """N."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """K."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The element type of the dense matrix that this weight stands for."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weight lies."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K] as a dense tensor (a view where the format is dense)."""

    @abstractmethod
    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        """y = x W^T + bias + scale * dropout(x) A^T B^T, see `ops.lora_linear`."""


@dataclass(frozen=True)
class DenseWeight(Weight):
    """A floating-point matrix; `tensor` is [N, K], a transposed view for [K, N] storage (`Conv1D`)."""

    tensor: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.tensor.shape[0]

    @property
    def in_features(self) -> int:
        return self.tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor if dtype is None else self.tensor.to(dtype)

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        return ops.lora_linear(x, self.tensor, a, b, scale=scale, bias=self.bias, dropout=dropout)


@dataclass(frozen=True)
class NF4Weight(Weight):
    """4-bit codes with flat or nested scales in bitsandbytes' layout, see `ops.nf4`."""

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    original_dtype: torch.dtype
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    bias: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    """Products run in this dtype and come back in the input's; None means the input's own."""

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.original_dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return ops.nf4_dequantize(
            self.packed,
            self.absmax,
            self.shape,
            dtype or self.original_dtype,
            blocksize=self.blocksize,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
        )

    def linear(self, x: Tensor) -> Tensor:
        """y = x W^T + bias, see `ops.nf4_linear`."""
        inner = x.to(self.compute_dtype or x.dtype)
        y = ops.nf4_linear(
            inner,
            self.packed,
            self.absmax,
            None if self.bias is None else self.bias.to(inner.dtype),
            out_features=self.shape[0],
            blocksize=self.blocksize,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
        )
        return self._restored(y, x)

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        y = ops.lora_linear(
            x.to(self.compute_dtype or x.dtype),
            self.packed,
            a,
            b,
            scale=scale,
            bias=self.bias,
            dropout=dropout,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            blocksize=self.blocksize,
        )
        return self._restored(y, x)

    def _restored(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.compute_dtype is None else y.to(x.dtype)


DENSE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Format = Callable[[nn.Module], "Weight | None"]
_formats: dict[str, Format] = {}


def register_format(qualified_name: str, view: Format) -> None:
    """Teach `weight_of` a module class.

    Args:
        qualified_name: `module.Class`, so that the library that defines it need not be imported.
        view: gives the module's Weight, or None if this instance cannot be served.
    """
    _formats[qualified_name] = view


def forward_replaced(module: nn.Module) -> bool:
    """Whether something serves in the place of the forward of the module's class, as hooks that offload do.

    Such hooks leave the class's forward in the instance when they are removed.
    """
    own = module.__dict__.get("forward")
    return own is not None and own != MethodType(type(module).forward, module)


def weight_of(module: nn.Module) -> Weight | None:
    """The weight of a linear module, or None for a module that no format knows.

    A subclass is served like its base only if it keeps the base's forward, and an instance only if nothing
    replaced its own (as hooks that move weights between devices do).
    """
    for cls in type(module).__mro__:
        view = _formats.get(f"{cls.__module__}.{cls.__qualname__}")
        if view is not None:
            kept = type(module).forward is getattr(cls, "forward", None)
            kept = kept and not forward_replaced(module)
            return view(module) if kept else None
    return None


def _parameter(module: nn.Module, name: str) -> Any:
    """`getattr` for what is mostly a parameter: nn.Module's own search for one takes half a microsecond."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def _linear_view(module: nn.Module) -> Weight | None:
    weight = _parameter(module, "weight")
    if not isinstance(weight, Tensor) or weight.dtype not in DENSE_DTYPES or weight.ndim != 2:
        return None
    if type(weight) not in (Tensor, nn.Parameter):
        return None  # a quantised or sharded tensor subclass has its own rules
    return DenseWeight(weight, _parameter(module, "bias"))


register_format("torch.nn.modules.linear.Linear", _linear_view)
