# SPDX-License-Identifier: Apache-2.0
"""DoRA (Liu et al., 2024, arXiv 2402.09353): LoRA whose sum with W has a learned norm for each output.

    y = c * (x W^T + s x A^T B^T) + bias            c = m / ||W + s B A||, norms along K

Norms are constants to the gradient, as section 4.3 of the paper proposes; `ops.dora_linear` has the formulas.

With dropout D the base's own product is not dropped, but what the magnitudes add to it is, as in PEFT:

    y = x W^T + bias - D(x) W^T + c * (D(x) W^T + s D(x) A^T B^T)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyfast import ops
from pyfast.nn.weight import NF4Weight, Weight
from pyfast.ops._check import NEST_BLOCK
from pyfast.ops.dora import column_scale

# Elements of an NF4 weight that are restored at a time for its norms.
_CPU_BLOCK, _BLOCK = 1 << 20, 1 << 26


class DoraMagnitude(nn.Module):
    """m [N] of one adapter, under PEFT's name `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)

    def forward(self, norms: Tensor) -> Tensor:
        """c [N], see `column_scale`."""
        return column_scale(self.weight, norms)


@torch.no_grad()
def row_norms(weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + s B A|| for each of N rows, in float32 or wider, see `ops.dora_norms`.

    Args:
        weight: W [N, K] of any format.
        a: lora_A [R, K].
        b: lora_B [N, R].
        scale: s.
    """
    if not isinstance(weight, NF4Weight):
        return ops.dora_norms(weight.dense(), a, b, scale=scale)
    count, step = weight.out_features, _rows_of_a_block(weight)
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    return torch.cat(
        [ops.dora_norms(_dense_rows(weight, rows), a, b[rows], scale=scale) for rows in parts]
    )


def _rows_of_a_block(weight: NF4Weight) -> int:
    """Rows to take at a time: so many that a block starts on a byte, a scale and a nested scale."""
    k = max(weight.in_features, 1)
    step = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _BLOCK) // k)
    unit = weight.blocksize * NEST_BLOCK
    whole = unit // math.gcd(unit, k)
    return math.ceil(step / whole) * whole


def _dense_rows(weight: NF4Weight, rows: slice) -> Tensor:
    """Rows of W, which begin where `_rows_of_a_block` says, as a dense tensor."""
    k, size = weight.in_features, weight.blocksize
    first, last = rows.start * k, rows.stop * k
    nested = weight.nested_absmax
    part = dataclasses.replace(
        weight,
        packed=weight.packed[first // 2 : math.ceil(last / 2)],
        absmax=weight.absmax[first // size : math.ceil(last / size)],
        nested_absmax=None
        if nested is None
        else nested[first // (size * NEST_BLOCK) : math.ceil(last / (size * NEST_BLOCK))],
        shape=(rows.stop - rows.start, k),
    )
    return part.dense()


def _scaled_product(
    weight: Weight, x: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor
) -> Tensor:
    """c * (x W^T + s x A^T B^T)."""
    norms = row_norms(weight, a, b, scale)
    if isinstance(weight, NF4Weight):
        y = ops.dora_linear(
            x.to(weight.compute_dtype or x.dtype),
            weight.packed,
            a,
            b,
            magnitude,
            norms,
            scale=scale,
            absmax=weight.absmax,
            nested_absmax=weight.nested_absmax,
            nested_offset=weight.nested_offset,
            blocksize=weight.blocksize,
        )
        return y if weight.compute_dtype is None else y.to(x.dtype)
    return ops.dora_linear(x, weight.dense(), a, b, magnitude, norms, scale=scale)


def dora_linear(
    weight: Weight,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    magnitude: Tensor,
    base: Callable[[Tensor], Tensor],
) -> Tensor:
    """One DoRA adapter over its base, see the top of this file.

    Args:
        weight: W [N, K] and bias.
        x: [..., K].
        a: lora_A [R, K].
        b: lora_B [N, R].
        scale: s.
        dropout: probability of dropping an element of the adapter's input.
        magnitude: m [N].
        base: x W^T + bias; called under dropout only.

    Returns:
        [..., N].
    """
    if dropout > 0.0:
        dropped = ops.dropout(x, dropout)
        y = _scaled_product(weight, dropped, a, b, scale, magnitude)
        return y + base(x - dropped)
    y = _scaled_product(weight, x, a, b, scale, magnitude)
    if weight.bias is None:
        return y
    bias = weight.bias.to(y.dtype)
    # Not in place where `ops.dora_linear` would have to make its result again for the backward.
    return y + bias if y.requires_grad else y.add_(bias)


def dora_joined(
    y: Tensor,
    product: Tensor | None,
    addition: Tensor,
    columns: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A DoRA adapter added to a result that others were added to before; PEFT's order and formula.

    Args:
        y: [..., N] with bias.
        product: D(x) W^T + bias under dropout; None takes y.
        addition: s D(x) A^T B^T.
        columns: c [N].
        bias: [N].
    """
    start = y if product is None else product
    inner = start if bias is None else start - bias
    scaled = ops.adapter_scale(inner + addition, columns)
    if product is not None:
        return y + (scaled - inner)
    return scaled if bias is None else scaled + bias
