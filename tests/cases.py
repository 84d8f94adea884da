# SPDX-License-Identifier: Apache-2.0
"""The op table: arguments for every registered op, by which the generic contract tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyfast import ops
from pyfast.testing import seeded


@dataclass(frozen=True)
class OpCase:
    """One op at one shape: `make(device, dtype)` gives the raw op's arguments."""

    op: str
    name: str
    make: Callable[[str, torch.dtype], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def packed(n, k, device, *, nested=False, blocksize=64, seed=1):
    """NF4 parts of a seeded [n, k] matrix: packed, absmax, nested_absmax, offset."""
    w = seeded((n, k), seed=seed, device=device, scale=0.5)
    codes, absmax = ops.nf4_quantize(w, blocksize)
    if not nested:
        return codes, absmax, None, None
    scales = ops.nf4_nest(absmax)
    return codes, scales.codes, scales.absmax, scales.offset


def _nf4_linear(m, n, k, nested, bias):
    def make(device, dtype):
        codes, absmax, inner, offset = packed(n, k, device, nested=nested)
        x = seeded((*m, k), seed=2, dtype=dtype, device=device).requires_grad_()
        b = seeded((n,), seed=3, dtype=dtype, device=device).requires_grad_() if bias else None
        return (x, codes, absmax, b, n, 64, inner, offset)

    return make


def _nf4_linear_backward(m, n, k, nested):
    def make(device, dtype):
        codes, absmax, inner, offset = packed(n, k, device, nested=nested)
        dy = seeded((*m, n), seed=2, dtype=dtype, device=device)
        return (dy, codes, absmax, k, 64, inner, offset)

    return make


def lora_args(m, n, k, r, device, dtype, *, nf4=None, bias=False, dropout=0.0, weight_grad=False):
    """Arguments of the raw `lora_linear`; nf4 is None (dense), "flat" or "nested"."""
    x = seeded((*m, k), seed=2, dtype=dtype, device=device).requires_grad_()
    a = seeded((r, k), seed=4, dtype=dtype, device=device, scale=k**-0.5).requires_grad_()
    b = seeded((n, r), seed=5, dtype=dtype, device=device).requires_grad_()
    t = seeded((n,), seed=3, dtype=dtype, device=device).requires_grad_() if bias else None
    seed = torch.tensor([11, 22], device=device) if dropout else None
    if nf4 is None:
        w = seeded((n, k), seed=1, dtype=dtype, device=device, scale=k**-0.5)
        return (
            x,
            w.requires_grad_(weight_grad),
            t,
            a,
            b,
            0.75,
            dropout,
            seed,
            None,
            None,
            None,
            64,
        )
    codes, absmax, inner, offset = packed(n, k, device, nested=nf4 == "nested")
    return (x, codes, t, a, b, 0.75, dropout, seed, absmax, inner, offset, 64)


def _lora(*shape, **options):
    return lambda device, dtype: lora_args(*shape, device, dtype, **options)


def _lora_backward(m, n, k, r, wanted, **options):
    def make(device, dtype):
        x, w, _, a, b, scale, p, seed, *rest = lora_args(m, n, k, r, device, dtype, **options)
        rows = 1
        for size in m:
            rows *= size
        dy = seeded((*m, n), seed=6, dtype=dtype, device=device)
        z = seeded((rows, (r + 7) // 8 * 8), seed=7, dtype=dtype, device=device)
        tensors = (t.detach() for t in (x, w, a, b))
        x, w, a, b = tensors
        return (dy, x, z, w, a, b, scale, p, seed, *rest, wanted)

    return make


def dora_args(m, n, k, r, device, dtype, *, nf4=None):
    """Arguments of the raw `dora_linear`; norms that differ from row to row."""
    x, w, _, a, b, scale, _, _, *quantized = lora_args(m, n, k, r, device, dtype, nf4=nf4)
    wide = torch.promote_types(dtype, torch.float32)
    magnitude = 1 + seeded((n,), seed=6, dtype=wide, device=device, scale=0.3)
    norms = 1 + seeded((n,), seed=7, dtype=wide, device=device).abs()
    return (x, w.detach(), a, b, magnitude.requires_grad_(), norms, scale, *quantized)


def _dora(*shape, **options):
    return lambda device, dtype: dora_args(*shape, device, dtype, **options)


def _dora_backward(m, n, k, r, wanted, **options):
    def make(device, dtype):
        x, *rest = (
            t.detach() if isinstance(t, torch.Tensor) else t
            for t in dora_args(m, n, k, r, device, dtype, **options)
        )
        dy = seeded((*m, n), seed=6, dtype=dtype, device=device)
        z = seeded((x.numel() // k, (r + 7) // 8 * 8), seed=7, dtype=dtype, device=device)
        return (dy, x, z, seeded((*m, n), seed=8, dtype=dtype, device=device), *rest, wanted)

    return make


def _dora_norms(n, k, r):
    def make(device, dtype):
        _, w, _, a, b, scale, *_ = lora_args((1,), n, k, r, device, dtype)
        return (w, a.detach(), b.detach(), scale)

    return make


def _lora_group(count, m):
    """Only the first member wants gradients: the generic tests look at the first output."""

    def make(device, dtype):
        x, *first = (lora_args(m, 12, 16, 3, device, dtype, bias=True)[i] for i in (0, 1, 2, 3, 4))
        others = [lora_args(m, 8, 16, 5, device, dtype)[1:5] for _ in range(count - 1)]
        members = [first, *([t if t is None else t.detach() for t in each] for each in others)]
        members += [[None] * 4] * (3 - count)
        kinds = (member[i] for i in range(4) for member in members)
        return (x, *kinds, *[None] * 9, [0.75] * count, 64)

    return make


def _lora_group_backward(m, wanted):
    def make(device, dtype):
        x, *rest, scales, blocksize = (
            t.detach() if isinstance(t, torch.Tensor) else t
            for t in _lora_group(3, m)(device, dtype)
        )
        dys = [seeded((*m, n), seed=6, dtype=dtype, device=device) for n in (12, 8, 8)]
        z = seeded((x.numel() // 16, 24), seed=7, dtype=dtype, device=device)
        return (*dys, x, z, *rest[:3], *rest[6:], scales, blocksize, wanted)

    return make


def _dropout(shape, p):
    def make(device, dtype):
        x = seeded(shape, seed=2, dtype=dtype, device=device).requires_grad_()
        return (x, p, torch.tensor([11, 22], device=device))

    return make


def _scale(shape):
    def make(device, dtype):
        x = seeded(shape, seed=2, dtype=dtype, device=device).requires_grad_()
        return (x, seeded(shape[-1:], seed=3, device=device).requires_grad_())

    return make


def _scale_backward(shape, wanted):
    def make(device, dtype):
        dy, x = (seeded(shape, seed=s, dtype=dtype, device=device) for s in (2, 4))
        return (dy, x, seeded(shape[-1:], seed=3, device=device), wanted)

    return make


def _scaled_linear(m, n, k, bias):
    """With a frozen weight and a float32 scale, as IA3 has them."""

    def make(device, dtype):
        x = seeded((*m, k), seed=2, dtype=dtype, device=device).requires_grad_()
        w = seeded((n, k), seed=1, dtype=dtype, device=device, scale=k**-0.5)
        b = seeded((n,), seed=4, dtype=dtype, device=device).requires_grad_() if bias else None
        return (x, w, seeded((k,), seed=3, device=device).requires_grad_(), b)

    return make


def _scaled_linear_backward(m, n, k, wanted):
    def make(device, dtype):
        x, w, scale, _ = _scaled_linear(m, n, k, False)(device, dtype)
        dy = seeded((*m, n), seed=6, dtype=dtype, device=device)
        return (dy, x.detach(), w, scale.detach(), wanted)

    return make


def bottleneck_args(m, k, r, device, dtype, *, norm, biases, activation):
    """Arguments of the raw `adapter_bottleneck`."""

    def tensor(shape, seed, scale=1.0):
        return seeded(shape, seed=seed, dtype=dtype, device=device, scale=scale).requires_grad_()

    return (
        tensor((*m, k), 2),
        tensor((r, k), 3, k**-0.5),
        tensor((k, r), 4, r**-0.5),
        tensor((r,), 5) if biases else None,
        tensor((k,), 6) if biases else None,
        tensor((k,), 7) if norm else None,
        tensor((k,), 8) if norm and biases else None,
        activation,
        1e-5,
    )


def _bottleneck(*shape, **options):
    return lambda device, dtype: bottleneck_args(*shape, device, dtype, **options)


def _bottleneck_backward(m, k, r, wanted, **options):
    def make(device, dtype):
        args = bottleneck_args(m, k, r, device, dtype, **options)
        x, down, up, _, _, norm_weight, norm_bias, activation, eps = (
            t.detach() if isinstance(t, torch.Tensor) else t for t in args
        )
        rows = x.numel() // k
        dy = seeded((*m, k), seed=9, dtype=dtype, device=device)
        h = seeded((rows, r), seed=10, dtype=dtype, device=device)
        return (dy, h, x, down, up, norm_weight, norm_bias, activation, eps, wanted)

    return make


def _dequantize(n, k, nested, blocksize=64):
    def make(device, dtype):
        codes, absmax, inner, offset = packed(n, k, device, nested=nested, blocksize=blocksize)
        return (codes, absmax, [n, k], dtype, blocksize, inner, offset)

    return make


CASES: list[OpCase] = [
    OpCase("nf4_quantize", "rows", lambda d, t: (seeded((6, 64), seed=1, dtype=t, device=d), 64)),
    OpCase("nf4_quantize", "odd", lambda d, t: (seeded((7, 13), seed=1, dtype=t, device=d), 32)),
    OpCase("nf4_quantize", "empty", lambda d, t: (seeded((0, 8), seed=1, dtype=t, device=d), 64)),
    OpCase(
        "nf4_nest",
        "partial",
        lambda d, t: (seeded((300,), seed=1, device=d).abs(), torch.tensor(0.5, device=d)),
        (torch.float32,),
    ),
    OpCase("nf4_dequantize", "flat", _dequantize(6, 64, False)),
    OpCase("nf4_dequantize", "nested-odd", _dequantize(5, 13, True)),
    OpCase("nf4_dequantize", "empty", _dequantize(0, 64, False)),
    OpCase("nf4_linear", "bias", _nf4_linear((2, 3), 8, 64, True, True)),
    OpCase("nf4_linear", "ragged", _nf4_linear((3,), 5, 70, False, False)),
    OpCase("nf4_linear", "empty", _nf4_linear((0,), 8, 64, False, True)),
    OpCase("nf4_linear_backward", "nested", _nf4_linear_backward((2, 3), 8, 64, True)),
    OpCase("nf4_linear_backward", "empty", _nf4_linear_backward((0,), 8, 64, False)),
    OpCase("dropout", "rows", _dropout((2, 3, 21), 0.25)),
    OpCase("dropout", "all", _dropout((4, 8), 1.0)),
    OpCase("dropout", "empty", _dropout((0, 8), 0.5)),
    OpCase("lora_linear", "dense", _lora((2, 5), 12, 16, 3)),
    OpCase("lora_linear", "bias-weight", _lora((5,), 12, 16, 1, bias=True, weight_grad=True)),
    OpCase("lora_linear", "nf4-dropout", _lora((5,), 8, 64, 4, nf4="nested", dropout=0.25)),
    OpCase("lora_linear", "empty", _lora((0, 5), 12, 16, 3, bias=True)),
    OpCase("lora_linear_backward", "dense", _lora_backward((2, 5), 12, 16, 3, [True] * 4)),
    OpCase(
        "lora_linear_backward",
        "nf4-dropout",
        _lora_backward((5,), 8, 64, 4, [True, False, True, True], nf4="flat", dropout=0.25),
    ),
    OpCase(
        "lora_linear_backward",
        "factors",
        _lora_backward((0, 5), 12, 16, 3, [False, False, True, True]),
    ),
    OpCase("lora_group", "three", _lora_group(3, (2, 5))),
    OpCase("lora_group", "two", _lora_group(2, (5,))),
    OpCase("lora_group", "empty", _lora_group(3, (0, 5))),
    OpCase("lora_group_backward", "all", _lora_group_backward((2, 5), [True] * 10)),
    OpCase("lora_group_backward", "factors", _lora_group_backward((5,), [False] * 4 + [True] * 6)),
    OpCase("dora_norms", "rows", _dora_norms(12, 16, 3)),
    OpCase("dora_linear", "dense", _dora((2, 5), 12, 16, 3)),
    OpCase("dora_linear", "nf4", _dora((5,), 8, 64, 4, nf4="nested")),
    OpCase("dora_linear", "empty", _dora((0, 5), 12, 16, 3)),
    OpCase("dora_linear_backward", "all", _dora_backward((2, 5), 12, 16, 3, [True] * 4)),
    OpCase(
        "dora_linear_backward",
        "nf4",
        _dora_backward((5,), 8, 64, 4, [True, False, False, True], nf4="flat"),
    ),
    OpCase("adapter_scale", "rows", _scale((2, 3, 10))),
    OpCase("adapter_scale", "empty", _scale((0, 10))),
    OpCase("adapter_scale_backward", "both", _scale_backward((2, 3, 10), [True, True])),
    OpCase("adapter_scale_backward", "scale", _scale_backward((4, 10), [False, True])),
    OpCase("scaled_linear", "bias", _scaled_linear((2, 3), 4, 10, True)),
    OpCase("scaled_linear", "few-rows", _scaled_linear((3,), 8, 10, False)),
    OpCase("scaled_linear", "empty", _scaled_linear((0,), 4, 10, True)),
    OpCase("scaled_linear_backward", "both", _scaled_linear_backward((2, 3), 4, 10, [True, True])),
    OpCase("scaled_linear_backward", "scale", _scaled_linear_backward((4,), 8, 10, [False, True])),
    OpCase("scaled_linear_backward", "x", _scaled_linear_backward((4,), 8, 10, [True, False])),
    OpCase(
        "adapter_bottleneck",
        "nemo",
        _bottleneck((2, 3), 12, 4, norm=True, biases=False, activation="silu"),
    ),
    OpCase(
        "adapter_bottleneck",
        "houlsby",
        _bottleneck((5,), 12, 3, norm=False, biases=True, activation="gelu"),
    ),
    OpCase(
        "adapter_bottleneck",
        "empty",
        _bottleneck((0,), 12, 3, norm=True, biases=True, activation="relu"),
    ),
    OpCase(
        "adapter_bottleneck_backward",
        "norm",
        _bottleneck_backward((2, 3), 12, 4, [True] * 7, norm=True, biases=True, activation="silu"),
    ),
    OpCase(
        "adapter_bottleneck_backward",
        "plain",
        _bottleneck_backward(
            (5,), 12, 3, [True] * 5 + [False] * 2, norm=False, biases=True, activation="relu"
        ),
    ),
    OpCase(
        "adapter_bottleneck_backward",
        "factors",
        _bottleneck_backward(
            (5,), 12, 3, [i in (1, 2) for i in range(7)], norm=True, biases=False, activation="gelu"
        ),
    ),
]
