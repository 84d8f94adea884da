# SPDX-License-Identifier: Apache-2.0
"""Launches behind `lora_group`; csrc/lora/group.h says what they compute.

One call into C++ a direction. Where torch's GEMM is the better one for a member, or ours cannot run, torch
makes the products with the W_i, around the skinny ones of csrc/lora/lora.h.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast import _extension
from pyfast.ops import _library
from pyfast.ops._lora_launch import (
    _FEW_RANKS,
    _MANY_ROWS,
    _copied,
    _in_place,
    _matrix,
    _share_device,
    _stored,
    factor_grad,
    low_rank,
    missing,
    padded,
)
from pyfast.ops._scratch import raw_stream, scratch_lock, workspace

_MANY_RANKS = 64
"""Most ranks of all members whose dA one pass of our own makes; torch makes each with a pass of its own."""
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
    torch_low: bool = False
    """Whether torch makes z or dz ahead of our GEMMs."""
    counters: int = 0
    """Bytes of zeros ahead of the workspace, and of both."""
    space: int = 0


def plan(x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> Plan:
    """The plan of a forward, or of a backward where the dy_i follow the W_i, A_i and B_i."""
    weights, a, b, *dys = members(tensors, len(scales))
    if reason := next(filter(None, map(missing, itertools.repeat(x), a, b)), ""):
        return Plan(reason)
    if len(set(scales)) > 1:
        return Plan(f"the members' scales differ: {', '.join(f'{scale:g}' for scale in scales)}")
    if len({a_rk.dtype for a_rk in a}) > 1:
        return Plan("the factors of the members must share a dtype")
    device, k = x.device.index, x.shape[-1]
    m, at = x.numel() // k, columns(a)
    counters = 4 * _extension.C.lora_counters
    shapes, why = _shapes(weights, b, dys[0] if dys else (x,) * len(b))
    gemm = ""
    if m and shapes:
        gemm, why = _extension.C.lora_group_gemm_name(device, m, k, shapes, bool(dys))
    if gemm:
        space = _extension.C.lora_group_workspace(device, m, k, shapes)
    else:
        sizes = {(k, at[-1]), *((b_nr.shape[0], b_nr.shape[1]) for b_nr in b)}
        space = max(_extension.C.lora_workspace(device, m, n, k, r) for n, r in sizes) if m else 0
    return Plan(
        "",
        device,
        (_extension.DTYPES[x.dtype], _extension.DTYPES[a[0].dtype]),
        m,
        gemm,
        f"lora_group_skinny ({why})" if why else "lora_group_skinny",
        *_in_place(x, k),
        tuple(
            (True, 0) if dy is None else _in_place(dy, dy.shape[-1]) for each in dys for dy in each
        ),
        tuple(at),
        gemm != ""
        and m >= _MANY_ROWS
        and sum(padded(r) for _, r, _ in shapes) > _FEW_RANKS
        and not _extension.C.lora_group_makes(device, m, k, shapes, bool(dys)),
        counters,
        counters + space,
    )


def _shapes(
    weights: Sequence[Tensor], b: Sequence[Tensor], here: Sequence[Tensor | None]
) -> tuple[list[tuple[int, int, int]], str]:
    """N, R and the pitch of W of the members that are here; none, and why, where a W cannot be read."""
    shapes = []
    for w_nk, b_nr, this in zip(weights, b, here, strict=True):
        in_place, by_out, pitch = _stored(w_nk)
        if not in_place or not by_out or w_nk.data_ptr() % 16:
            return [], "a weight does not lie by out feature on 16 bytes"
        if this is not None:
            shapes.append((b_nr.shape[0], b_nr.shape[1], pitch))
    return shapes, ""


def _problem(
    plan: Plan, stream: int, space: Tensor, n: int, r: int, x: Tensor, a: Tensor, b: Tensor,
    scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    """What both entry points begin with; no W, so that only products with the factors are made."""
    counters, k = space.data_ptr(), x.shape[-1]
    return (
        plan.device, stream, *plan.types, plan.rows, n, k, r, x.data_ptr(), plan.pitch_x, 0, k, True,
        a.data_ptr(), b.data_ptr(), scale, plan.columns[-1], 0, 0, counters + plan.counters, counters,
    )  # fmt: skip


def forward(plan: Plan, *args: Any) -> tuple[list[Tensor], Tensor]:
    """All y_i and z, see `ops.lora_group`."""
    x, scales = args[0], args[-1]
    weights, biases, a, b = members(args[1:-1])
    z = x.new_empty(plan.rows, plan.columns[-1])
    if plan.rows == 0:
        return [x.new_empty(*x.shape[:-1], b_nr.shape[0]) for b_nr in b], z
    if not plan.x_in_place:
        x = _copied(x)
    if plan.gemm:
        return _fused_forward(plan, x, z, scales[0], weights, biases, a, b), z
    a_all, stream = stacked(a, a[0].dtype), raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        # Without W nothing reads B; it must only not be null.
        _extension.C.lora_forward(
            *_problem(plan, stream, space, x.shape[-1], z.shape[1], x, a_all, a_all, scales[0]),
            0, 0, z.data_ptr(),
        )  # fmt: skip
    _library.record("lora_group", plan.beside)
    ys = []
    for first, w_nk, bias, b_nr in zip(plan.columns, weights, biases, b, strict=False):
        y_mn = F.linear(_matrix(x), w_nk, bias)
        y_mn.addmm_(z[:, first : first + b_nr.shape[1]], b_nr.to(x.dtype).t())
        ys.append(_library.shaped(y_mn, x))
    return ys, z


def _call(
    plan: Plan, stream: int, space: Tensor, x: Tensor, scale: float, z: Tensor, given: bool
) -> tuple[Any, ...]:
    """What both entry points for whole groups begin with."""
    _share_device()
    counters = space.data_ptr()
    return (
        plan.device, stream, *plan.types, plan.rows, x.shape[-1], x.data_ptr(), plan.pitch_x, scale,
        z.data_ptr(), z.shape[1], given, counters + plan.counters, counters,
    )  # fmt: skip


def _fused_forward(
    plan: Plan, x: Tensor, z: Tensor, scale: float, weights: Sequence[Tensor],
    biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """All y_i; z is filled."""
    a, b = _contiguous(a), _contiguous(b)
    biases = [bias if bias is None or bias.is_contiguous() else _copied(bias) for bias in biases]
    ys = [x.new_empty(*x.shape[:-1], b_nr.shape[0]) for b_nr in b]
    if plan.torch_low:
        low_rank(z, _matrix(x), stacked(a, x.dtype).t(), scale)
    call = [
        (*b_nr.shape, first, w_nk.data_ptr(), w_nk.stride(0), a_rk.data_ptr(), b_nr.data_ptr(),
         _extension.ptr(bias), 0, y.data_ptr(), 0)
        for first, w_nk, bias, a_rk, b_nr, y in zip(plan.columns, weights, biases, a, b, ys, strict=False)
    ]  # fmt: skip
    stream = raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        served = _extension.C.lora_group_forward(
            *_call(plan, stream, space, x, scale, z, plan.torch_low), call
        )
    _library.record("lora_group", served)
    return ys


def _fused_backward(
    plan: Plan, dys: dict[int, tuple[Tensor, int]], x: Tensor, z: Tensor, scale: float,
    weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], want_x: bool,
    want_a: Sequence[bool], want_b: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted of dx, dA_i and dB_i."""
    a = _contiguous(a)
    ranks = [b[i].shape[1] for i in dys]
    lies = [0, *itertools.accumulate(map(padded, ranks))]
    many = plan.rows >= _MANY_ROWS
    given = plan.torch_low or (many and not want_x and lies[-1] > _FEW_RANKS)
    # A member's columns of dz; zeros between them where torch fills it.
    whole = not given or all(r % 8 == 0 for r in ranks)
    dz = (x.new_empty if whole else x.new_zeros)(plan.rows, lies[-1])
    low = {i: dz[:, at : at + r] for i, at, r in zip(dys, lies, ranks, strict=False)}
    if given and (want_x or any(want_a)):
        for i, (dy, _) in dys.items():
            low_rank(low[i], _matrix(dy), b[i], scale)
    # By torch where our skinny products are bound by mma.sync.
    torch_a, torch_b = many and lies[-1] > _MANY_RANKS, [many and r > _FEW_RANKS for r in ranks]
    grads_a = {} if torch_a else {i: torch.empty_like(a[i]) for i in dys if want_a[i]}
    grads_b = {
        i: torch.empty_like(b[i])
        for i, by_torch in zip(dys, torch_b, strict=True)
        if want_b[i] and not by_torch
    }
    call = [
        (*b[i].shape, plan.columns[i], weights[i].data_ptr(), weights[i].stride(0), a[i].data_ptr(),
         b[i].data_ptr(), dy.data_ptr(), pitch, _extension.ptr(grads_a.get(i)),
         _extension.ptr(grads_b.get(i)))
        for i, (dy, pitch) in dys.items()
    ]  # fmt: skip
    grad_x = [x.new_empty(x.shape)] if want_x else []
    stream = raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        served = _extension.C.lora_group_backward(
            *_call(plan, stream, space, x, scale, z, given), call, dz.data_ptr(),
            grad_x[0].data_ptr() if want_x else 0,
        )  # fmt: skip
    _library.record("lora_group_backward", served or "lora_group_skinny")
    for i, (dy, _) in dys.items():
        if want_a[i] and i not in grads_a:
            grads_a[i] = factor_grad(low[i].t(), _matrix(x), a[i].dtype)
        if want_b[i] and i not in grads_b:
            first = plan.columns[i]
            z_mr = z[:, first : first + b[i].shape[1]]
            grads_b[i] = factor_grad(_matrix(dy).t(), z_mr, b[i].dtype)
    return [*grad_x, *(grads_a[i] for i in sorted(grads_a)), *(grads_b[i] for i in sorted(grads_b))]


def _contiguous(factors: Sequence[Tensor]) -> list[Tensor]:
    return [each if each.is_contiguous() else each.contiguous() for each in factors]


def backward(plan: Plan, *args: Any) -> list[Tensor]:
    """The wanted of dx, dW_i, dA_i and dB_i in this order."""
    x, z, scales, wanted = args[MOST], args[MOST + 1], args[-2], args[-1]
    weights, a, b = members(args[MOST + 2 : -2])
    want_x, (want_w, want_a, want_b) = wanted[0], members(wanted[1:], len(weights))
    b = _contiguous(b)
    if not plan.x_in_place:
        x = _copied(x)
    dys = {
        i: (dy if fits else _copied(dy), pitch)
        for i, (dy, (fits, pitch)) in enumerate(zip(args, plan.dy_in_place, strict=False))
        if dy is not None
    }
    grads_w = [_matrix(dys[i][0]).t() @ _matrix(x) for i, want in enumerate(want_w) if want]
    if plan.gemm:
        made = _fused_backward(plan, dys, x, z, scales[0], weights, a, b, want_x, want_a, want_b)
        return [*made[:want_x], *grads_w, *made[want_x:]]
    make = torch.empty if plan.rows else torch.zeros
    grads_b = {
        i: make(b[i].shape, dtype=b[i].dtype, device=x.device)
        for i, want in enumerate(want_b) if want
    }  # fmt: skip
    # dA^T of all members; an absent one has columns of zeros in dz, and so adds nothing to dx.
    a_all, at = stacked(a, a[0].dtype), plan.columns
    grad_a_kr = make(a_all.t().shape, dtype=a_all.dtype, device=x.device)
    dz = (torch.empty_like if len(dys) == len(weights) else torch.zeros_like)(z)
    if plan.rows:
        _products(plan, dys, x, z, dz, a_all, b, scales, want_x, any(want_a), grad_a_kr, grads_b)
    _library.record("lora_group_backward", plan.beside)
    grads_a = [
        grad_a_kr[:, at[i] : at[i] + a[i].shape[0]].t().contiguous()
        for i, want in enumerate(want_a) if want
    ]  # fmt: skip
    grads = [*grads_w, *grads_a, *grads_b.values()]
    if not want_x:
        return grads
    grad_x = torch.mm(dz, a_all.to(x.dtype))
    for i, (dy, _) in dys.items():
        grad_x.addmm_(_matrix(dy), weights[i])
    return [grad_x.view(x.shape), *grads]


def _products(
    plan: Plan, dys: dict[int, tuple[Tensor, int]], x: Tensor, z: Tensor, dz: Tensor, a_all: Tensor,
    b: Sequence[Tensor], scales: Sequence[float], want_x: bool, want_a: bool, grad_a_kr: Tensor,
    grads_b: dict[int, Tensor],
) -> None:  # fmt: skip
    """dz, dA^T and the dB_i, where wanted."""
    stream, k, step = raw_stream(plan.device), x.shape[-1], z.element_size()
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        for i, (dy, pitch) in dys.items():
            (n, r), first, grad_b = b[i].shape, plan.columns[i] * step, grads_b.get(i)
            # Without W, a dx that is not null asks for dz alone.
            _extension.C.lora_backward(
                *_problem(plan, stream, space, n, r, x, a_all, b[i], scales[i]),
                dy.data_ptr(), pitch, z.data_ptr() + first, dz.data_ptr() + first,
                dz.data_ptr() if want_x or want_a else 0, 0, _extension.ptr(grad_b),
            )  # fmt: skip
        if want_a:
            # x^T dz is the product that makes dB = dy^T z, with x for dy and dz for z.
            _extension.C.lora_backward(
                *_problem(plan, stream, space, k, z.shape[1], x, a_all, a_all, 1.0),
                x.data_ptr(), plan.pitch_x, dz.data_ptr(), dz.data_ptr(), 0, 0, grad_a_kr.data_ptr(),
            )  # fmt: skip
