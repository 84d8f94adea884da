# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations the ops with matrix products take, for `torch.utils.flop_counter`.

As torch counts its own: 2 M N K for a product of [M, K] and [K, N], nothing for what is done element by
element (scales, dropout, activations, norms along rows, NF4's decoding). A backward counts what is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from pyfast.ops import (  # noqa: F401  they define the ops
    adapter,
    dora,
    lora,
    lora_group,
    nf4_linear,
    scaled_linear,
)
from pyfast.ops._library import OPS
from pyfast.ops._lora_group_plan import MOST

Shape = Sequence[int]


def _of(op: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return register_flop_formula(OPS[op].overload.overloadpacket)


def _rows(shape: Shape) -> int:
    return math.prod(shape[:-1])


def _low_rank(m: int, a: Shape, b: Shape) -> int:
    """Both products with the factors, A [R, K] and B [N, R]."""
    return 2 * m * a[0] * (a[1] + b[0])


def _layer(m: int, a: Shape, b: Shape) -> int:
    return 2 * m * b[0] * a[1] + _low_rank(m, a, b)


def _layer_backward(
    m: int, a: Shape, b: Shape, want_x: bool, want_w: bool, want_a: bool, want_b: bool
) -> int:
    """dx = dy W + dz A, dW = dy^T x, dA = dz^T x and dB = dy^T z, with dz = s dy B."""
    (r, k), n = a, b[0]
    wide, with_a, with_b = 2 * m * n * k, 2 * m * r * k, 2 * m * n * r
    return (
        (want_x + want_w) * wide
        + (want_x + want_a) * with_a
        + (want_b + (want_x or want_a)) * with_b
    )


@_of("lora_linear")
def _lora_linear(
    x: Shape, weight: Shape, bias: Shape | None, a: Shape, b: Shape, *_: Any, **__: Any
) -> int:
    return _layer(_rows(x), a, b)


@_of("lora_linear_backward")
def _lora_linear_backward(
    grad_y: Shape,
    x: Shape | None,
    z: Shape | None,
    weight: Shape,
    a: Shape,
    b: Shape,
    *rest: Any,
    **_: Any,
) -> int:
    return _layer_backward(_rows(grad_y), a, b, *rest[-1])


@_of("lora_group")
def _lora_group(x: Shape, *rest: Any, **_: Any) -> int:
    pairs = zip(rest[2 * MOST : 3 * MOST], rest[3 * MOST : 4 * MOST], strict=True)
    return sum(_layer(_rows(x), a, b) for a, b in pairs if a is not None)


@_of("lora_group_backward")
def _lora_group_backward(*args: Any, **_: Any) -> int:
    want_x, *wanted = args[-1]
    first = 2 * MOST + 2  # of the A_i; ahead of them the dy_i, x, z and the W_i
    return sum(
        _layer_backward(
            _rows(dy), args[first + i], args[first + MOST + i], want_x, *wanted[i::MOST]
        )
        for i, dy in enumerate(args[:MOST])
        if dy is not None
    )


@_of("nf4_linear")
def _nf4_linear(
    x: Shape,
    packed: Shape,
    absmax: Shape,
    bias: Shape | None,
    out_features: int,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * math.prod(x) * out_features


@_of("nf4_linear_backward")
def _nf4_linear_backward(
    grad_y: Shape, packed: Shape, absmax: Shape, in_features: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(grad_y) * in_features


@_of("dora_norms")
def _dora_norms(weight: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(b) * a[1]


@_of("dora_linear")
def _dora_linear(x: Shape, weight: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return _layer(_rows(x), a, b)


@_of("dora_linear_backward")
def _dora_linear_backward(
    grad_y: Shape, x: Shape, z: Shape | None, y: Shape | None, weight: Shape, a: Shape, b: Shape,
    *rest: Any, **_: Any,
) -> int:  # fmt: skip
    """As the kernels', which read y for dm."""
    want_x, want_a, want_b, _want_m = rest[-1]
    return _layer_backward(_rows(grad_y), a, b, want_x, False, want_a, want_b)


@_of("adapter_bottleneck")
def _adapter_bottleneck(x: Shape, down: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * _rows(x) * math.prod(down)


@_of("adapter_bottleneck_backward")
def _adapter_bottleneck_backward(
    grad_y: Shape, h: Shape, x: Shape, down: Shape, up: Shape, norm_weight: Shape | None,
    norm_bias: Shape | None, activation: str, eps: float, wanted: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """dU = dy^T act(h), and with dh = act'(h) * (dy U): dD = dh^T norm(x), and dh D for dx and the norm's."""
    want_x, want_down, want_up, want_down_bias, _want_up_bias, want_norm_weight, want_norm_bias = (
        wanted
    )
    through_norm = want_x or want_norm_weight or want_norm_bias
    products = want_up + want_down + through_norm + (want_down or want_down_bias or through_norm)
    return 2 * math.prod(h) * down[1] * products


@_of("scaled_linear")
def _scaled_linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * math.prod(weight)


@_of("scaled_linear_backward")
def _scaled_linear_backward(grad_y: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Both gradients come from dy W."""
    return 2 * _rows(x) * math.prod(weight)
