# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA kernels behind `lora_linear`; csrc/lora/lora.h says what they compute.

One call into C++ a direction. Where torch's GEMM is the better one, or ours cannot run, the products with
W go through it and C++ makes those with A and B.

Above `FEW_RANKS` ranks torch makes the products of A and B's size, unless there is dropout or the GEMM makes
them: from 32 ranks on its kernels read x and dy at the speed of memory, where ours are bound by `mma.sync`
(8192 x 4096, 64 ranks: 27 and 41 us). Not for few rows: launches decide there, and torch may add up the parts
of a split product in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast import _extension
from pyfast.ops import _library, _nf4_gemm, _philox
from pyfast.ops._alone import share_device
from pyfast.ops._nf4_few_rows import few_rows, serves
from pyfast.ops._scratch import raw_stream, scratch, scratch_lock, workspace
from pyfast.ops.dropout import dropout_op
from pyfast.ops.nf4 import dequantize_into

_HALVES = (torch.float16, torch.bfloat16)
_MAX_ROWS = 64 << 16
"""Each 64 rows have a counter; the kernels have 2^17 in all (csrc/lora/lora.h), half of them for these."""


_NO_DROPOUT = "lora_linear_skinny (the GEMM for sm_80 has no dropout)"

FEW_RANKS, MANY_ROWS = 16, 1024
"""Up to so many ranks, or below so many rows, our kernels make the products of A and B's size."""


def padded(rank: int) -> int:
    """Columns of z: the rank rounded up to whole 16-byte units, which TMA needs."""
    return (rank + 7) // 8 * 8


def missing(x: Tensor, a: Tensor, b: Tensor) -> str:
    """Why the kernels cannot serve a call, of x or of dy; empty when they can."""
    if reason := _extension.missing_cuda():
        return reason
    if x.dtype not in _HALVES:
        return f"there are kernels for float16 and bfloat16, not {x.dtype}"
    if a.dtype is not b.dtype or a.dtype not in _extension.DTYPES:
        return f"lora_A and lora_B must share a dtype, got {a.dtype} and {b.dtype}"
    k, n = a.shape[1], b.shape[0]
    if k % 8 or n % 8 or min(k, n, a.shape[0]) == 0:
        return "in and out features must be multiples of 8, they and the rank not zero"
    if (rows := x.shape[:-1].numel()) > _MAX_ROWS:
        return f"at most {_MAX_ROWS} rows, got {rows}"
    return ""


class Plan(NamedTuple):
    """What every launch of one direction for one signature shares."""

    reason: str
    """Why the kernels cannot serve; the rest is then unset."""
    device: int = 0
    sizes: tuple[int, ...] = ()
    """Codes of the two dtypes, M, N, K and R."""
    gemm: str = ""
    """Our kernel for the product with W; empty where torch's serves or none is wanted."""
    beside: str = ""
    """What to call the kernels where torch makes the product with W, and why it does."""
    x_in_place: bool = True
    """Whether the kernels can read x as it lies; else they get a copy. So for dy, W, A with B, and bias."""
    pitch_x: int = 0
    dy_in_place: bool = True
    pitch_dy: int = 0
    w_in_place: bool = True
    by_out: bool = True
    pitch_w: int = 0
    factors_in_place: bool = True
    bias_in_place: bool = True
    pitch_z: int = 0
    counters: int = 0
    """Bytes of zeros ahead of the workspace, and of both."""
    space: int = 0
    few_rows: bool = False
    """Whether a kernel that reads the packed bytes makes the product with an NF4 W."""
    packed: bool = False
    """The same for many rows, low-rank product included."""
    torch_low: bool = False
    """Whether torch makes z, or dz, while there is no dropout."""
    torch_grads: bool = False
    """The same of dA and dB."""
    dx_over_x: bool = False
    """Whether dx may take the place of x, without dropout and where GEMMs may make dz."""


def plan(
    x: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, absmax: Tensor | None, blocksize: int,
    grad_y: Tensor | None = None, want_x: bool = True, bias: Tensor | None = None, drops: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a forward, or with `grad_y` of a backward, which may have no x to read, and `drops` part
    of dx."""
    quantized = absmax is not None
    like: Tensor = grad_y if x is None else x  # type: ignore[assignment]
    if reason := missing(like, a, b):
        return Plan(reason)
    (r, k), n = a.shape, b.shape[0]
    device, m = like.device.index, like.shape[:-1].numel()
    w_in_place, by_out, pitch_w = (True, True, k) if quantized else stored(weight)
    counters = 4 * _extension.C.lora_counters
    gemm, why = "", ""
    few = absmax is not None and grad_y is None and m > 0
    few = few and serves(like, weight, absmax, blocksize)  # type: ignore[arg-type]
    if few:
        why = "few rows of an NF4 weight"
    elif m and want_x:
        gemm, why = _extension.C.lora_gemm_name(
            device, m, n, k, pitch_w, by_out, grad_y is not None
        )
        if not quantized and weight.data_ptr() % 16:
            gemm, why = "", "the weight does not begin on 16 bytes"
    makes = bool(gemm) and _extension.C.lora_makes(device, m, n, k, r, grad_y is not None)
    # A GEMM that makes z, or dz and for few ranks dA and dB, spares passes over x, or twice dy and x.
    read = k if grad_y is None else 2 * n + k if r <= FEW_RANKS else n
    packed = quantized and not few and m > 0 and want_x and not drops
    packed = packed and _nf4_gemm.serves(
        like if grad_y is None else grad_y, weight, n if grad_y is None else k, blocksize,
        by_out=grad_y is None, read=m * read if makes else 0,
    )  # fmt: skip
    if packed:
        gemm, why, makes = "", "", False
    dy_in_place, pitch_dy = (True, n) if grad_y is None else in_place(grad_y, n)
    x_in_place, pitch_x = (True, k) if x is None else in_place(x, k)
    many = r > FEW_RANKS and r % 8 == 0 and m >= MANY_ROWS
    return Plan(
        "",
        device,
        (_extension.DTYPES[like.dtype], _extension.DTYPES[a.dtype], m, n, k, r),
        gemm,
        f"lora_linear_skinny ({why})" if why else "lora_linear_skinny",
        x_in_place,
        pitch_x,
        dy_in_place,
        pitch_dy,
        w_in_place,
        by_out,
        pitch_w,
        a.is_contiguous() and b.is_contiguous(),
        bias is None or bias.is_contiguous(),
        padded(r),
        counters,
        counters + _extension.C.lora_workspace(device, m, n, k, r) if m else 0,
        few,
        packed,
        many and not makes,
        many,
        bool(gemm and grad_y is not None and x_in_place and pitch_x == k)
        and _extension.C.lora_dx_over_x(device, m, n, k, r),
    )


def in_place(tensor: Tensor, columns: int) -> tuple[bool, int]:
    """Whether [..., columns] lies as rows in 16-byte units at a fixed pitch; that pitch, or a copy's."""
    matrix = tensor.reshape(tensor.numel() // columns, columns)
    pitch, step = matrix.stride()
    fits = step == 1 and pitch % 8 == 0 and pitch >= columns
    fits = fits and matrix.data_ptr() == tensor.data_ptr() and tensor.data_ptr() % 16 == 0
    return fits, pitch if fits else columns


def stored(weight: Tensor) -> tuple[bool, bool, int]:
    """Whether W [N, K] can be read as it lies, whether by out feature, and the pitch; or a copy's."""
    (n, k), (down, across) = weight.shape, weight.stride()
    if across == 1 and down >= k:
        return True, True, down
    if down == 1 and across >= n:
        return True, False, across
    return False, True, k


def copied(tensor: Tensor) -> Tensor:
    """Contiguous, on 16 bytes."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _add_product(to: Tensor, low: Tensor, rank: int, factor: Tensor) -> None:
    """to += low[:, :rank] factor. Each view that is not needed would cost a microsecond."""
    low = low if low.shape[1] == rank else low[:, :rank]
    to.addmm_(low, factor if factor.dtype is to.dtype else factor.to(to.dtype))


def low_rank(out: Tensor, tensor_mc: Tensor, factor: Tensor, scale: float) -> None:
    """out = scale tensor factor, rounded once."""
    out.addmm_(tensor_mc, factor.to(out.dtype), beta=0, alpha=scale)


def factor_grad(
    left: Tensor, right: Tensor, dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """left right of a factor's dtype, rounded once where torch can; added to `into` if that is given."""
    if into is not None and dtype is left.dtype:
        return into.addmm_(left, right)
    if dtype is torch.float32 and left.is_cuda:
        made = torch.mm(left, right, out_dtype=dtype)
    else:
        made = torch.mm(left, right).to(dtype)
    return made if into is None else into.add_(made)


class Room(NamedTuple):
    """Memory that a backward may use for its results."""

    x: bool = False
    """Whether x is nobody else's, so that dx may take its place."""
    grad_a: Tensor | None = None
    """Contiguous, of A's dtype; dA is added to it. So for B."""
    grad_b: Tensor | None = None


NO_ROOM = Room()


def room_for(factor: Tensor, given: Tensor | None, want: bool, rows: int) -> Tensor:
    """Where the gradient of a factor goes: one of no rows is zero."""
    if not want:
        return factor.new_empty(0)
    if given is not None:
        return given
    return torch.empty_like(factor) if rows else torch.zeros_like(factor)


def _dense(
    plan: Plan, weight: Tensor, dtype: torch.dtype, absmax: Tensor | None,
    nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int,
) -> Tensor:  # fmt: skip
    """The dense weight; an NF4 one is decoded into the scratch buffer, under the caller's lock."""
    if absmax is None:
        return weight if plan.w_in_place else weight.contiguous()
    _, _, _, n, k, _ = plan.sizes
    w = scratch(n * k, weight, dtype).view(n, k)
    dequantize_into(w, weight, absmax, blocksize, nested_absmax, offset)
    return w


def _problem(
    plan: Plan, stream: int, space: Tensor, x: Tensor | None, w: Tensor | None, a: Tensor | None,
    b: Tensor | None, scale: float, dropout: float, seed: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments that both directions share."""
    share_device()
    counters = space.data_ptr()
    return (
        plan.device, stream, *plan.sizes, _extension.ptr(x), plan.pitch_x,
        w.data_ptr() if w is not None and plan.gemm else 0, plan.pitch_w, plan.by_out,
        0 if a is None else a.data_ptr(), 0 if b is None else b.data_ptr(), scale, plan.pitch_z,
        0 if seed is None else seed.data_ptr(), _philox.threshold(dropout) if dropout else 0,
        counters + plan.counters, counters,
    )  # fmt: skip


def forward(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int, columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z, see `ops.lora_linear`; y's columns times float32 `columns`, for a plan with a GEMM of ours."""
    _, _, m, n, _, r = plan.sizes
    shape = (*x.shape[:-1], n)
    z = x.new_empty(m, plan.pitch_z)
    if m == 0:
        return x.new_empty(shape), z
    if not plan.x_in_place:
        x = copied(x)
    if not plan.factors_in_place:
        a, b = a.contiguous(), b.contiguous()
    if not plan.bias_in_place:
        bias = copied(bias)  # type: ignore[arg-type]
    given = plan.torch_low and dropout == 0.0
    if given:
        low_rank(z, as_matrix(x), a.t(), scale)
    stream, served = raw_stream(plan.device), "lora_linear_torch"
    with scratch_lock:
        w: Tensor | None = None
        if plan.few_rows:
            y = few_rows(as_matrix(x), weight, absmax, bias, n, blocksize, nested_absmax, offset)  # type: ignore[arg-type]
        elif plan.packed:
            y = x.new_empty(*shape)
        else:
            w = _dense(plan, weight, x.dtype, absmax, nested_absmax, offset, blocksize)
            y = x.new_empty(*shape) if plan.gemm else F.linear(as_matrix(x), w, bias)
        if plan.gemm or not given:
            space = workspace(x, stream, plan.space, plan.counters)
            served = _extension.C.lora_forward(
                *_problem(
                    plan, stream, space, x, w, None if given else a, b, scale, dropout, seed
                ),
                _extension.ptr(bias), _extension.ptr(columns), y.data_ptr(), z.data_ptr(),
            )  # fmt: skip
    if plan.packed:
        served = _nf4_gemm.gemm(
            y, as_matrix(x), weight, absmax, blocksize, nested_absmax, offset,  # type: ignore[arg-type]
            by_out=True, bias=bias, z=z, factor=b,
        )  # fmt: skip
    _library.record("lora_linear", served or plan.beside)
    if not plan.gemm and not plan.packed:
        _add_product(y, z, r, b.t())
        y = _library.shaped(y, x)
    return y, z


def backward(
    plan: Plan, grad_y: Tensor, x: Tensor | None, z: Tensor | None, weight: Tensor, a: Tensor,
    b: Tensor, scale: float, dropout: float, seed: Tensor | None, absmax: Tensor | None,
    nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int, wanted: Sequence[bool],
    room: Room = NO_ROOM,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dW, dA and dB, empty where not wanted, see `ops.lora_linear`; what `room` has is used for them.

    Without x no dW and no dA may be wanted, without z no dB."""
    want_x, want_w, want_a, want_b = wanted
    _, _, m, _, k, r = plan.sizes
    x_shape, dtype = (*grad_y.shape[:-1], k), grad_y.dtype
    if dropout and plan.gemm.startswith("gemm_sm80"):
        plan = plan._replace(gemm="", beside=_NO_DROPOUT)
    if x is not None and not plan.x_in_place:
        x = copied(x)
    if not plan.dy_in_place:
        grad_y = copied(grad_y)
    if not plan.factors_in_place:
        a, b = a.contiguous(), b.contiguous()
    given, composed = plan.torch_low and dropout == 0.0, plan.torch_grads and dropout == 0.0
    grad_a = room_for(a, room.grad_a, want_a and not composed, m)
    grad_b = room_for(b, room.grad_b, want_b and not composed, m)
    grad_w = grad_y.new_empty(0)
    if want_w:
        grad_w = torch.mm(as_matrix(grad_y).t(), as_matrix(x))  # type: ignore[arg-type]
    if m == 0:
        return grad_y.new_empty(x_shape if want_x else 0), grad_w, grad_a, grad_b
    dz = grad_y.new_empty(m, plan.pitch_z)
    if given and (want_x or want_a):
        low_rank(dz, as_matrix(grad_y), b, scale)
    w: Tensor | None = None
    stream, served = raw_stream(plan.device), "lora_linear_torch"
    with scratch_lock:
        if want_x:
            if not plan.packed:
                w = _dense(plan, weight, dtype, absmax, nested_absmax, offset, blocksize)
            if plan.packed:
                grad_x = grad_y.new_empty(x_shape)
            elif not plan.gemm:
                grad_x = torch.mm(as_matrix(grad_y), w)  # type: ignore[arg-type]
            else:
                over = room.x and plan.dx_over_x and dropout == 0.0 and share_device()
                grad_x = x if over else grad_y.new_empty(x_shape)  # type: ignore[assignment]
        else:
            grad_x = grad_y.new_empty(0)
        if plan.gemm or not composed:  # what is composed without a GEMM of ours is given too
            space = workspace(grad_y, stream, plan.space, plan.counters)
            served = _extension.C.lora_backward(
                *_problem(
                    plan, stream, space, x, w, a, None if given else b, scale, dropout, seed
                ),
                grad_y.data_ptr(), plan.pitch_dy, _extension.ptr(z), dz.data_ptr(),
                grad_x.data_ptr() if want_x else 0,
                grad_a.data_ptr() if want_a and not composed else 0,
                grad_b.data_ptr() if want_b and not composed else 0,
                room.grad_a is not None, room.grad_b is not None,
            )  # fmt: skip
    if composed:
        if want_a:
            grad_a = factor_grad(dz.t(), as_matrix(x), a.dtype, room.grad_a)  # type: ignore[arg-type]
        if want_b:
            grad_b = factor_grad(as_matrix(grad_y).t(), z, b.dtype, room.grad_b)  # type: ignore[arg-type]
    if want_x and plan.packed:
        served = _nf4_gemm.gemm(
            grad_x, as_matrix(grad_y), weight, absmax, blocksize, nested_absmax, offset,  # type: ignore[arg-type]
            by_out=False, z=dz, factor=a,
        )  # fmt: skip
    _library.record("lora_linear_backward", served or plan.beside)
    if want_x and not plan.gemm and not plan.packed:
        if dropout == 0.0:
            _add_product(grad_x, dz, r, a)
        else:
            grad_x.add_(dropout_op(dz[:, :r] @ a.to(dtype), dropout, seed))
        grad_x = grad_x if grad_y.ndim == 2 else grad_x.view(x_shape)
    return grad_x, grad_w, grad_a, grad_b
