# SPDX-License-Identifier: Apache-2.0
"""What the launches behind `lora_group` have in common: members of a group, and the plan of a direction."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast import _extension
from pyfast.ops._lora_launch import FEW_RANKS, MANY_ROWS, in_place, missing, padded, stored
from pyfast.ops._nf4_few_rows import few_rows, serves
from pyfast.ops._scratch import scratch
from pyfast.ops.nf4 import dequantize_into

MOST = 3
"""Members of a group; one of fewer has None in the last places."""


def members(values: Sequence[Any], count: int | None = None) -> list[Sequence[Any]]:
    """Arguments that come `MOST` of a kind, by kind, without those of absent members."""
    count = count or (MOST if values[MOST - 1] is not None else MOST - 1)
    return [values[at : at + count] for at in range(0, len(values), MOST)]


def columns(a: Sequence[Tensor]) -> list[int]:
    """Where each member's columns of z begin, and their number."""
    return [0, *itertools.accumulate(padded(a_rk.shape[0]) for a_rk in a)]


def stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ..], rows of zeros between them so that they begin where the columns of z do."""
    blocks = []
    for a_rk in a:
        blocks.append(a_rk.to(dtype))
        if gap := padded(a_rk.shape[0]) - a_rk.shape[0]:
            blocks.append(blocks[-1].new_zeros(gap, a_rk.shape[1]))
    return torch.cat(blocks)


class Plan(NamedTuple):
    """What every launch of one direction for one signature shares."""

    reason: str
    """Why the kernels cannot serve; the rest is then unset."""
    device: int = 0
    types: tuple[int, int] = (0, 0)
    """Codes of the dtypes of x and of the factors."""
    rows: int = 0
    gemm: str = ""
    """Our kernel for the product with the widest W, or for dx; empty where torch's serves."""
    beside: str = "lora_group_skinny"
    """What to call the kernels where torch makes the products with the W_i, and why it does."""
    x_in_place: bool = True
    pitch_x: int = 0
    dy_in_place: tuple[tuple[bool, int], ...] = ()
    """For each member, whether the kernels can read dy as it lies, and its pitch or a copy's."""
    columns: tuple[int, ...] = ()
    few_rows: bool = False
    """Whether kernels that read the packed bytes make the products with the W_i."""
    torch_low: bool = False
    """Whether torch makes z or dz ahead of our GEMMs."""
    counters: int = 0
    """Bytes of zeros ahead of the workspace, and of both."""
    space: int = 0


def plan(
    x: Tensor | None, scales: tuple[float, ...], blocksize: int, *tensors: Tensor | None
) -> Plan:
    """The plan of a forward, or of a backward, which may have no x to read, where the dy_i follow the other
    tensors."""
    weights, a, b, absmax, _, _, *dys = members(tensors, len(scales))
    like: Tensor = x if x is not None else next(dy for dy in dys[0] if dy is not None)
    if reason := next(filter(None, map(missing, itertools.repeat(like), a, b)), ""):
        return Plan(reason)
    if len(set(scales)) > 1:
        return Plan(f"the members' scales differ: {', '.join(f'{scale:g}' for scale in scales)}")
    if len({a_rk.dtype for a_rk in a}) > 1:
        return Plan("the factors of the members must share a dtype")
    device, k = like.device.index, a[0].shape[1]
    m, at = like.shape[:-1].numel(), columns(a)
    x_in_place, pitch_x = (True, k) if x is None else in_place(x, k)
    counters = 4 * _extension.C.lora_counters
    shapes, why = _shapes(weights, b, absmax, k, dys[0] if dys else (x,) * len(b))
    few = not dys and m > 0 and _few_rows(like, weights, absmax, blocksize)
    gemm = ""
    if few:
        why = "few rows of NF4 weights"
    elif m and shapes:
        gemm, why = _extension.C.lora_group_gemm_name(device, m, k, shapes, bool(dys))
    if gemm:
        space = _extension.C.lora_group_workspace(device, m, k, shapes)
    else:
        sizes = {(k, at[-1]), *((b_nr.shape[0], b_nr.shape[1]) for b_nr in b)}
        space = max(_extension.C.lora_workspace(device, m, n, k, r) for n, r in sizes) if m else 0
    return Plan(
        "",
        device,
        (_extension.DTYPES[like.dtype], _extension.DTYPES[a[0].dtype]),
        m,
        gemm,
        f"lora_group_skinny ({why})" if why else "lora_group_skinny",
        x_in_place,
        pitch_x,
        tuple(
            (True, 0) if dy is None else in_place(dy, dy.shape[-1]) for each in dys for dy in each
        ),
        tuple(at),
        few,
        gemm != ""
        and m >= MANY_ROWS
        and sum(padded(r) for _, r, _ in shapes) > FEW_RANKS
        and not _extension.C.lora_group_makes(device, m, k, shapes, bool(dys)),
        counters,
        counters + space,
    )


def _few_rows(
    x: Tensor, weights: Sequence[Tensor], absmax: Sequence[Tensor | None], blocksize: int
) -> bool:
    each = zip(weights, absmax, strict=True)
    return all(scales is not None and serves(x, w, scales, blocksize) for w, scales in each)


def _shapes(
    weights: Sequence[Tensor], b: Sequence[Tensor], absmax: Sequence[Tensor | None], k: int,
    here: Sequence[Tensor | None],
) -> tuple[list[tuple[int, int, int]], str]:  # fmt: skip
    """N, R and the pitch of W of the members that are here; none, and why, where a W cannot be read."""
    shapes = []
    for w_nk, b_nr, quantized, this in zip(weights, b, absmax, here, strict=True):
        in_place, by_out, pitch = (True, True, k) if quantized is not None else stored(w_nk)
        if not in_place or not by_out or (quantized is None and w_nk.data_ptr() % 16):
            return [], "a weight does not lie by out feature on 16 bytes"
        if this is not None:
            shapes.append((b_nr.shape[0], b_nr.shape[1], pitch))
    return shapes, ""


class Weights(NamedTuple):
    """The W_i, dense or NF4."""

    tensors: Sequence[Tensor]
    features: Sequence[int]
    """N of each."""
    nf4: Sequence[Sequence[Tensor | None]]
    """absmax, nested_absmax and offset of all members."""
    blocksize: int

    def products(self, x_mk: Tensor, biases: Sequence[Tensor | None], few: bool) -> list[Tensor]:
        """x W_i^T + bias_i by torch, or of few rows from NF4 bytes; under the caller's lock."""
        if not few:
            dense = zip(self.dense(x_mk, x_mk.shape[1]), biases, strict=True)
            return [linear(x_mk, w_nk, bias) for w_nk, bias in dense]
        parts = zip(self.tensors, self.features, biases, *self.nf4, strict=True)
        return [
            few_rows(x_mk, w, absmax, bias, n, self.blocksize, nested_absmax, offset)
            for w, n, bias, absmax, nested_absmax, offset in parts
        ]

    def dense(self, like: Tensor, k: int) -> list[Tensor]:
        """Dense ones of that dtype; NF4 ones are decoded into the scratch buffer, under the caller's lock."""
        absmax = self.nf4[0]
        sizes = [
            0 if each is None else n * k for n, each in zip(self.features, absmax, strict=True)
        ]
        if not any(sizes):
            return list(self.tensors)
        found = []
        room = torch.split(scratch(sum(sizes), like), sizes)
        for w_nk, n, part, scales, *nested in zip(
            self.tensors, self.features, room, *self.nf4, strict=True
        ):
            if scales is not None:
                dequantize_into(part, w_nk, scales, self.blocksize, *nested)
            found.append(w_nk if scales is None else part.view(n, k))
        return found


def contiguous(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors, copies of those that are not contiguous."""
    return [each if each.is_contiguous() else each.contiguous() for each in factors]
