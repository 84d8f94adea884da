# SPDX-License-Identifier: Apache-2.0
"""Two or three LoRA linears that read one input (q, k and v; gate and up), forward and backward.

Letters as in `lora`; member i has W_i [N_i, K], A_i [R_i, K], B_i [N_i, R_i] and a scale s_i:

    z_i  = s_i x A_i^T         y_i  = x W_i^T + bias_i + z_i B_i^T
    dz_i = s_i dy_i B_i        dx   = sum_i dy_i W_i + dz_i A_i
    dA_i = dz_i^T x            dB_i = dy_i^T z_i

A W_i may be NF4: its bytes, with the parts of its scales after the B_i, as in `lora_linear`.

x is read once for all z_i and once for all dA_i, and dx is summed in one tensor. All z_i lie side by side
in z, each from a multiple of 8 columns on, with zeros between. There is no dropout here: each adapter
would draw a mask of its own.

One node stands for the group in the graph. Derivatives of all members come from one backward, or from
several without retain_graph, as if each member had a node of its own: see `_held`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast.ops import _library, _lora_group_launch, _lora_group_plan
from pyfast.ops._accumulate import those_into_grad
from pyfast.ops._autocast import cast_for_autocast
from pyfast.ops._held import Held, versions
from pyfast.ops._lora_group_check import check_group
from pyfast.ops._lora_group_plan import MOST, columns, members, stacked
from pyfast.ops._remake import recipe
from pyfast.ops.lora import _scaled_product
from pyfast.ops.nf4 import nf4_dequantize

_NF4 = "Tensor? absmax, Tensor? nested_absmax, Tensor? offset"


def _schema(kinds: str) -> str:
    """Arguments of each kind for every member; the last member may be absent."""
    names = [kind.split() for kind in kinds.split(", ")]
    return ", ".join(
        f"{type_ + '?' if i == MOST and not type_.endswith('?') else type_} {name}{i}"
        for type_, name in names
        for i in range(1, MOST + 1)
    )


def _padded_outputs(ys: list[Tensor], z: Tensor) -> tuple[Tensor, ...]:
    """As many outputs as the schema has; that of an absent member is empty."""
    return (*ys, *(z.new_empty(0) for _ in range(MOST - len(ys))), z)


def _group_fake(*args: Any) -> tuple[Tensor, ...]:
    check_group(*args)
    x = args[0]
    _, _, a, b, *_ = members(args[1:-2])
    ys = [x.new_empty((*x.shape[:-1], b_nr.shape[0])) for b_nr in b]
    return _padded_outputs(ys, x.new_empty((math.prod(x.shape[:-1]), columns(a)[-1])))


def _dense(
    like: Tensor, weights: Sequence[Tensor], b: Sequence[Tensor],
    nf4: Sequence[Sequence[Tensor | None]], blocksize: int, k: int,
) -> list[Tensor]:  # fmt: skip
    """The W_i of that dtype."""
    return [
        w_nk if absmax is None else nf4_dequantize(
            w_nk, absmax, (b_nr.shape[0], k), like.dtype, blocksize=blocksize,
            nested_absmax=nested_absmax, nested_offset=offset,
        )
        for w_nk, b_nr, absmax, nested_absmax, offset in zip(weights, b, *nf4, strict=True)
    ]  # fmt: skip


def _group_reference(*args: Any) -> tuple[Tensor, ...]:
    check_group(*args)
    x, scales = args[0], args[-2]
    weights, biases, a, b, *nf4 = members(args[1:-2])
    weights = _dense(x, weights, b, nf4, args[-1], x.shape[-1])
    x_mk = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    at = columns(a)
    if len(set(scales)) == 1:
        z = _scaled_product(x_mk, stacked(a, x.dtype).t(), scales[0])
    else:
        z = x_mk.new_zeros(x_mk.shape[0], at[-1])
        for first, a_rk, scale in zip(at, a, scales, strict=False):
            z_mr = z[:, first : first + a_rk.shape[0]]
            z_mr.addmm_(x_mk, a_rk.to(x.dtype).t(), beta=0, alpha=scale)
    ys = []
    for first, w_nk, bias, b_nr in zip(at, weights, biases, b, strict=False):
        y_mn = torch.nn.functional.linear(x_mk, w_nk, bias)
        y_mn.addmm_(z[:, first : first + b_nr.shape[1]], b_nr.to(x.dtype).t())
        ys.append(_library.shaped(y_mn, x))
    return _padded_outputs(ys, z)


def _padded_grads(
    dy: Tensor, wanted: Sequence[bool], grads: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """As many gradients as the schema has; that of what is not wanted is empty."""
    made = iter(grads)
    return tuple(next(made) if want else dy.new_empty(0) for want in wanted)


def _first(dys: Sequence[Tensor | None]) -> Tensor:
    """Any that is here: it has x's rows, dtype and device, and x may be absent."""
    return next(dy for dy in dys if dy is not None)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    dy, wanted = _first(args[:MOST]), args[-1]
    k = args[2 * MOST + 2].shape[1]
    of_x = (*dy.shape[:-1], k), dy.dtype
    of_factors = (
        (each.shape, each.dtype) for each in itertools.compress(args[MOST + 2 :], wanted[1:])
    )
    like = itertools.chain([of_x] if wanted[0] else [], of_factors)
    grads = [dy.new_empty(tuple(shape), dtype=dtype) for shape, dtype in like]
    return _padded_grads(dy, wanted, grads)


def _backward_reference(*args: Any) -> tuple[Tensor, ...]:
    x, z, scales, wanted = args[MOST], args[MOST + 1], args[-3], args[-1]
    weights, a, b, *nf4 = members(args[MOST + 2 : -3])
    want_x, wants = wanted[0], members(wanted[1:], len(weights))
    any_dy, at = _first(args[:MOST]), columns(a)
    dtype, leading, k = any_dy.dtype, any_dy.shape[:-1], a[0].shape[1]
    m = math.prod(leading)
    x_mk = any_dy.new_empty(0) if x is None else x.reshape(m, k)
    dys = {i: dy.reshape(m, b[i].shape[0]) for i, dy in enumerate(args[:MOST]) if dy is not None}
    dz = any_dy.new_zeros(m, at[-1])
    if want_x or any(wants[1]):
        for i, dy_mn in dys.items():
            dz_mr = dz[:, at[i] : at[i] + b[i].shape[1]]
            dz_mr.addmm_(dy_mn, b[i].to(dtype), beta=0, alpha=scales[i])
    grads = []
    if want_x:
        weights = _dense(any_dy, weights, b, nf4, args[-2], k)
        grad_x = dz @ stacked(a, dtype)
        for i, dy_mn in dys.items():
            grad_x.addmm_(dy_mn, weights[i])
        grads.append(grad_x.view(*leading, k))
    grads += [dys[i].t() @ x_mk for i, want in enumerate(wants[0]) if want]
    if any(wants[1]):
        # Copies, since an op's outputs must not share memory.
        grad_a = dz.t() @ x_mk
        grads += [
            grad_a[first : first + a_rk.shape[0]].to(a_rk.dtype, copy=True)
            for first, a_rk, want in zip(at, a, wants[1], strict=False)
            if want
        ]
    for i, b_nr in enumerate(b):
        if wants[2][i]:
            z_mr = z[:, at[i] : at[i] + b_nr.shape[1]]
            grads.append((dys[i].t() @ z_mr).to(b_nr.dtype))
    return _padded_grads(any_dy, wanted, grads)


_backward_plan = _library.planned(_lora_group_plan.plan)


def _backward_kernel(*args: Any, room: Mapping[int, Tensor] = {}) -> tuple[Tensor, ...]:
    """`room`: gradients of factors that the results are added to, by their place among all A_i and B_i."""
    plan = _backward_plan(args[MOST], tuple(args[-3]), args[-2], *args[MOST + 2 : -3], *args[:MOST])
    if plan.reason:
        result = list(_library.fall_back("lora_group_backward", plan.reason, *args))
        for i, grad in room.items():
            result[1 + MOST + i] = grad.add_(result[1 + MOST + i])
        return tuple(result)
    made = _lora_group_launch.backward(plan, *args, room)
    return _padded_grads(_first(args), args[-1], made)


_group_backward = _library.define(
    f"lora_group_backward({_schema('Tensor? grad_y')}, Tensor? x, Tensor? z, "
    f"{_schema('Tensor weight, Tensor a, Tensor b, ' + _NF4)}, float[] scales, int blocksize, "
    "bool[] wanted) "
    f"-> ({', '.join(['Tensor'] * (1 + 3 * MOST))})",
    fake=_backward_fake,
    reference=_backward_reference,
    kernel=_backward_kernel,
    devices=("CUDA",),
)


_KINDS = 7
"""Of arguments that come for every member."""


def _into_grads(
    ctx: Any, args: tuple[Any, ...], wanted: list[bool]
) -> tuple[tuple[Tensor, ...], list[bool]]:
    """What the kernel makes; and what of it is wanted still, less what went into a factor's `.grad`."""
    first = 1 + MOST  # of the factors in `wanted`, which has x and the W_i ahead of them
    factors = args[2 * MOST + 2 :][: 2 * MOST]
    gone = those_into_grad(ctx, ctx.place, factors, wanted[first:])
    made = _backward_kernel(*args, room={i: f.grad for i, f in gone.items() if f.grad is not None})
    for i, factor in gone.items():
        factor.grad = made[first + i]
    return made, [want and i - first not in gone for i, want in enumerate(wanted)]


class _LoraGroup(torch.autograd.Function):
    """Saves the weights, the factors and, for those that are wanted of the results in brackets, x unless it
    can be made again (dW_i, dA_i) and z (dB_i); formulas at the top of this file."""

    @staticmethod
    def forward(ctx, below, *args):  # type: ignore[no-untyped-def]
        outputs = below(*args)
        weights, _, a, b, *nf4 = (args[1 + i * MOST :][:MOST] for i in range(_KINDS))
        _, want_x, *wants = ctx.needs_input_grad[: 2 + 4 * MOST]
        reads_x = any(wants[:MOST]) or any(wants[2 * MOST : 3 * MOST])
        ctx.remake = recipe(args[0], norms=True) if reads_x else None
        x = args[0] if reads_x and ctx.remake is None else None
        z = outputs[-1] if any(wants[3 * MOST :]) else None
        ctx.save_for_backward(x, z, *weights, *a, *b, *itertools.chain(*nf4))
        ctx.scales, ctx.blocksize = args[-2:]
        idle = [
            y for i, y in enumerate(outputs[:MOST])
            if weights[i] is None or not (want_x or any(wants[i::MOST]))
        ]  # fmt: skip
        # Members whose derivatives may come; less where outputs are kept for who may never take them.
        ctx.count, ctx.held = MOST - len(idle), None
        ctx.direct = below is _group_kernel
        # Of the A_i among the tensors; the B_i follow.
        ctx.place = 1 + sum(tensor is not None for tensor in args[1 : 1 + 2 * MOST])
        ctx.mark_non_differentiable(outputs[-1], *idle)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        dys, needs = grads[:MOST], ctx.needs_input_grad
        here = [dy is not None for dy in dys]
        done = set(itertools.compress(range(MOST), here))
        if not done:
            return (None,) * len(needs)
        if ctx.held is None or not done.isdisjoint(ctx.held.done):  # the error is torch's own
            saved = ctx.saved_tensors
        else:
            saved = ctx.held.saved
            ctx.held.check()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            done.update(ctx.held.done if ctx.held is not None else ())
            ctx.held = Held(saved, versions(saved), done) if len(done) < ctx.count else None
        want_x, *rest = needs[1 : 2 + 4 * MOST]
        rest = [want and here[i % MOST] for i, want in enumerate(rest)]
        want_bias = rest[MOST : 2 * MOST]
        wanted = [want_x, *rest[:MOST], *rest[2 * MOST :]]
        results: list[Tensor | None] = [None] * len(wanted)
        if any(wanted):
            x = saved[0] if ctx.remake is None else ctx.remake()
            args = (*dys, x, *saved[1:], ctx.scales, ctx.blocksize, wanted)
            if ctx.direct and _library.direct(next(dy for dy in dys if dy is not None)):
                made, wanted = _into_grads(ctx, args, wanted)
            else:
                made = _group_backward(*args)
            results = [grad if want else None for grad, want in zip(made, wanted, strict=True)]
        biases = [
            dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]).sum(0) if want else None
            for dy, want in zip(dys, want_bias, strict=True)
        ]
        fixed = (None,) * ((_KINDS - 4) * MOST + 2)
        return (None, *results[: 1 + MOST], *biases, *results[1 + MOST :], *fixed)


@_library.planned
def _forward_plan(*args: Any) -> _lora_group_plan.Plan:
    check_group(*args)
    weights, _, *rest = (args[1 + i * MOST :][:MOST] for i in range(_KINDS))
    return _lora_group_plan.plan(args[0], *args[-2:], *weights, *itertools.chain(*rest))


def _group_kernel(*args: Any) -> tuple[Tensor, ...]:
    plan = _forward_plan(*args[:-2], tuple(args[-2]), args[-1])
    if plan.reason:
        result: tuple[Tensor, ...] = _library.fall_back("lora_group", plan.reason, *args)
        return result
    ys, z = _lora_group_launch.forward(plan, *args)
    return _padded_outputs(ys, z)


_group = _library.define(
    f"lora_group(Tensor x, {_schema('Tensor weight, Tensor? bias, Tensor a, Tensor b, ' + _NF4)}, "
    f"float[] scales, int blocksize) -> ({', '.join(['Tensor'] * (MOST + 1))})",
    fake=_group_fake,
    reference=_group_reference,
    kernel=_group_kernel,
    devices=("CUDA",),
    autograd=_LoraGroup,
)


NF4Scales = tuple[Tensor, Tensor | None, Tensor | None]
_DENSE = (None, None, None)


def lora_group(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    nf4: Sequence[NF4Scales | None] | None = None,
    blocksize: int = 64,
) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + bias_i + scale_i x A_i^T B_i^T for two or three linears of one input.

    Differentiable in all tensors; what is computed, cast and rounded is as in `lora_linear`.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weights: each [N_i, K] of x's dtype, or NF4 bytes uint8 [ceil(N_i K / 2), 1].
        a: each lora_A, [R_i, K].
        b: each lora_B, [N_i, R_i].
        scales: of each adapter.
        biases: each [N_i] or None.
        nf4: for each NF4 weight its absmax, nested_absmax and nested_offset, as `lora_linear` has them.
        blocksize: elements that share a scale.

    Returns:
        Each [..., N_i] of the compute dtype.

    Raises:
        ValueError: numbers, shapes or devices do not fit.
        TypeError: a dense weight's dtype is not the compute dtype.
        QuantStateError: an NF4 weight's parts do not fit [N_i, K].
        UnsupportedError: x is a nested tensor.
    """
    count = len(weights)
    biases = (None,) * count if biases is None else biases
    nf4 = (None,) * count if nf4 is None else nf4
    if not 2 <= count <= MOST or not count == len(a) == len(b) == len(biases) == len(nf4):
        got = ", ".join(str(len(each)) for each in (weights, a, b, biases, nf4))
        raise ValueError(
            f"lora_group: needs 2 to {MOST} weights and as many a, b, biases and nf4, got {got}"
        )
    x, *cast = cast_for_autocast(x, *weights, *biases)
    full = [None] * (MOST - count)
    biases = [None if bias is None else bias.to(x.dtype) for bias in cast[count:]]
    scaled = itertools.chain(
        *([*each, *full] for each in zip(*(s or _DENSE for s in nf4), strict=True))
    )
    outputs = _group(
        x, *cast[:count], *full, *biases, *full, *a, *full, *b, *full, *scaled, tuple(scales), blocksize
    )  # fmt: skip
    ys: tuple[Tensor, ...] = outputs[:count]
    return ys
