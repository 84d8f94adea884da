# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters behind a block of a transformer layer (Houlsby et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyfast import ops
from pyfast.nn.switchable import Attachment


class BottleneckAdapter(nn.Module):
    """y = x + act(norm(x) D^T + d) U^T + u, see `ops.adapter_bottleneck`; U, u and d start as zeros.

    Args:
        width: K, the model's hidden size.
        size: R.
        norm: whether there is a LayerNorm in front.
        bias: whether there are d and u.
        activation: "silu", "gelu" or "relu".
        where: device and dtype of the parameters.
    """

    def __init__(
        self, width: int, size: int, norm: bool, bias: bool, activation: str, **where: Any
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Parameter(nn.init.xavier_normal_(torch.empty(size, width, **where)))
        self.up = nn.Parameter(torch.zeros(width, size, **where))
        self.down_bias = nn.Parameter(torch.zeros(size, **where)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(width, **where)) if bias else None
        self.norm_weight = nn.Parameter(torch.ones(width, **where)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width, **where)) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., K]."""
        return ops.adapter_bottleneck(
            x,
            self.down,
            self.up,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            activation=self.activation,
        )


def _adapt(block: nn.Module, _: Any, output: Any) -> Any:
    held: Any = block._modules[Bottlenecks.child]
    if isinstance(output, tuple):
        return (held.adapted(output[0]), *output[1:])
    return held.adapted(output)


class Bottlenecks(Attachment):
    """The adapters behind one block; several active ones follow one another."""

    child = "bottleneck"
    op = "adapter_bottleneck"
    by_sample = True
    no_merge = "it is no linear function of what it reads"

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()

    def hook(self, owner: nn.Module) -> list[RemovableHandle]:
        return [owner.register_forward_hook(_adapt)]

    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        if name in self.adapters:
            yield from self.adapters[name].named_parameters()

    def remove(self, name: str) -> None:
        super().remove(name)
        if name in self.adapters:
            del self.adapters[name]

    def adapted(self, x: Tensor) -> Tensor:
        """A block's output [..., K] through every active adapter, or each sample's."""
        if self.samples is not None and self.enabled:
            return self.samples.adapted(
                x, self.adapters, lambda name, rows: self.adapters[name](rows)
            )
        for name in self.active if self.enabled else ():
            x = self.adapters[name](x)
        return x
