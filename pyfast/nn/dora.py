# SPDX-License-Identifier: Apache-2.0
"""DoRA (Liu et al., 2024, arXiv 2402.09353): LoRA whose sum with W has a learned norm for each output.

    y = c * (x W^T + s x A^T B^T) + bias            c = m / ||W + s B A||, norms along K

Norms are constants to the gradient, as section 4.3 of the paper proposes:

    dy' = c * dy, which goes on into LoRA's backward            dm = sum over rows of dy * y' / ||W + s B A||

where y' is the product before scaling. It is kept for dm: read back from y, it would be rounded twice, be
lost where c is 0, and y could not be changed in place by whoever called the layer.

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

# Elements of W that are summed with s B A at a time: on the CPU they stay in a core's cache, elsewhere
# each block costs three launches.
_CPU_BLOCK, _BLOCK = 1 << 20, 1 << 22


class DoraMagnitude(nn.Module):
    """m [N] of one adapter, under PEFT's name `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)

    def forward(self, norms: Tensor) -> Tensor:
        """c [N], see `column_scale`."""
        return column_scale(self.weight, norms)


def column_scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    """c = m / norms in norms' dtype, with norms rounded to m's, so that both cancel before training.

    A row of zeros gives zeros for any c; its norm counts as 1, so that none is NaN.
    """
    rounded = norms.to(magnitude.dtype).to(norms.dtype)
    return magnitude / rounded.masked_fill(rounded == 0, 1)


@torch.no_grad()
def row_norms(weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + s B A|| for each of N rows, in float32 or wider.

    The sum is formed for a block of rows at a time. Its square as ||W||^2 + 2 s W A^T B^T + ... would need W
    in float32 as well, and would have no digits left in rows where the sum nearly cancels.

    Args:
        weight: W [N, K] of any format.
        a: lora_A [R, K].
        b: lora_B [N, R].
        scale: s.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    count, step = weight.out_features, _rows_of_a_block(weight)
    norms = torch.empty(count, dtype=wide, device=weight.device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        block = _dense_rows(weight, rows)
        # Row by row also where W is stored by in feature: cuBLAS refuses some such blocks as a result.
        total = block.to(wide, copy=True, memory_format=torch.contiguous_format)
        total.addmm_(b[rows], a, alpha=scale)
        norms[rows] = torch.linalg.vector_norm(total, dim=1)
    return norms


def _rows_of_a_block(weight: Weight) -> int:
    """Rows to take at a time; of NF4 so many that a block starts on a byte, a scale and a nested scale."""
    k = max(weight.in_features, 1)
    step = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _BLOCK) // k)
    if not isinstance(weight, NF4Weight):
        return step
    unit = weight.blocksize * NEST_BLOCK
    whole = unit // math.gcd(unit, k)
    return math.ceil(step / whole) * whole


def _dense_rows(weight: Weight, rows: slice) -> Tensor:
    """Rows of W, which begin where `_rows_of_a_block` says, as a dense tensor."""
    if not isinstance(weight, NF4Weight):
        return weight.dense()[rows]
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
    bias = weight.bias
    bare: Weight = weight if bias is None else dataclasses.replace(weight, bias=None)  # type: ignore[type-var]
    dropped = ops.dropout(x, dropout) if dropout > 0.0 else x
    y = bare.lora_linear(dropped, a, b, scale, 0.0)
    columns = column_scale(magnitude, row_norms(weight, a, b, scale))
    y = ops.adapter_scale(y, columns) if torch.is_grad_enabled() else y.mul_(columns)
    if dropout > 0.0:
        return y + base(x - dropped)
    return y if bias is None else y.add_(bias)


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
