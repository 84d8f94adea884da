# SPDX-License-Identifier: Apache-2.0
"""DoRA's linear layer over a dense or NF4 weight, forward and backward, and the norms it needs.

Letters: M tokens, N out features, K in features, R rank. With c = m / ||W + s B A||, whose norms along K are
constants to the gradient (Liu et al., "DoRA", 2024, section 4.3), and with A [R, K] and B [N, R]:

    z  = s x A^T                     y  = c * y'        y' = x W^T + z B^T
    dy' = c * dy                     dz = s dy' B       dx = dy' W + dz A
    dA = dz^T x                      dB = dy'^T z       dm = sum over rows of dy * y' / ||W + s B A||

For dm y is kept rather than y': whoever called has it anyway. Where it was changed in place since, it is
made again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast.ops import _check, _dora_launch, _library, _lora_launch
from pyfast.ops._autocast import cast_for_autocast
from pyfast.ops._remake import recipe
from pyfast.ops.adapter import adapter_scale
from pyfast.ops.lora import lora_linear
from pyfast.ops.nf4 import FLOATS

_COMPUTE = (*FLOATS, torch.float64)

# Elements of W that are summed with s B A at a time: on the CPU they stay in a core's cache, elsewhere
# each block costs three launches.
CPU_BLOCK, BLOCK = 1 << 20, 1 << 22

# --- dora_norms ---------------------------------------------------------------------------------


def _wide(weight: Tensor, a: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)


def _norms_fake(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    op = "dora_norms"
    for name, tensor in (("weight", weight), ("lora_A", a), ("lora_B", b)):
        _check.check_dtype(op, name, tensor, _COMPUTE)
    n, r = _check.rows(op, "lora_B", b), _check.rows(op, "lora_A", a)
    _check.check_shape(op, "weight", weight, (n, a.shape[1]))
    _check.check_shape(op, "lora_B", b, (n, r))
    _check.check_same_device(op, weight, lora_A=a, lora_B=b)
    return weight.new_empty(n, dtype=_wide(weight, a))


def _norms_reference(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    norms = _norms_fake(weight, a, b, scale)
    a, b = a.to(norms.dtype), b.to(norms.dtype)
    step = max(1, (CPU_BLOCK if weight.is_cpu else BLOCK) // max(a.shape[1], 1))
    for start in range(0, len(norms), step):
        rows = slice(start, start + step)
        # Row by row also where W is stored by in feature: cuBLAS refuses some such blocks as a result.
        total = weight[rows].to(norms.dtype, copy=True, memory_format=torch.contiguous_format)
        total.addmm_(b[rows], a, alpha=scale)
        norms[rows] = torch.linalg.vector_norm(total, dim=1)
    return norms


def _norms_kernel(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    _norms_fake(weight, a, b, scale)
    if reason := _dora_launch.missing_norms(weight, a, b):
        _library.record("dora_norms", f"dora_norms_torch ({reason})")
        return _norms_reference(weight, a, b, scale)
    return _dora_launch.norms(weight, a, b, scale)


_norms = _library.define(
    "dora_norms(Tensor weight, Tensor a, Tensor b, float scale) -> Tensor",
    fake=_norms_fake,
    reference=_norms_reference,
    kernel=_norms_kernel,
    devices=("CUDA",),
)


@torch.no_grad()
def dora_norms(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """||W + s B A|| of each of N rows, in float32 or wider; constants to the gradient.

    The sum is formed. Its square as ||W||^2 + 2 s W A^T B^T + ... would have no digits left in rows where
    the sum nearly cancels.

    Args:
        weight: W [N, K].
        a: lora_A [R, K].
        b: lora_B [N, R].
        scale: s.

    Returns:
        [N].

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: something is not floating point.
    """
    norms: Tensor = _norms(weight, a, b, scale)
    return norms


# --- dora_linear --------------------------------------------------------------------------------


def _divisor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Norms rounded to m's dtype, so that both cancel before training; those of rows of zeros count as 1,
    so that no c is NaN."""
    rounded = norms.to(magnitude.dtype).to(norms.dtype)
    return rounded.masked_fill(rounded == 0, 1)


def column_scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    """c = m / norms in norms' dtype, see `_divisor`."""
    return magnitude / _divisor(magnitude, norms)


def _product(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *quantized: Any
) -> tuple[Tensor, Tensor]:
    """y' and z."""
    lora = _library.OPS["lora_linear"].reference
    out: tuple[Tensor, Tensor] = lora(x, weight, None, a, b, scale, 0.0, None, *quantized)
    return out


def _dora_fake(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, norms: Tensor,
    scale: float, absmax: Tensor | None, nested_absmax: Tensor | None, offset: Tensor | None,
    blocksize: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "dora_linear"
    _check.check_dtype(op, "x", x, _COMPUTE)
    r, n = _check.rows(op, "lora_A", a), _check.rows(op, "lora_B", b)
    k = _check.features(op, "x", x)
    if absmax is None:
        _check.check_shape(op, "weight", weight, (n, k))
        _check.check_weight(op, "weight", weight, x)
    else:
        _check.check_quantized(op, weight, absmax, n * k, blocksize, nested_absmax, offset)
    for name, tensor, shape in (
        ("lora_A", a, (r, k)), ("lora_B", b, (n, r)), ("magnitude", magnitude, (n,)),
        ("norms", norms, (n,)),
    ):  # fmt: skip
        _check.check_dtype(op, name, tensor, _COMPUTE)
        _check.check_shape(op, name, tensor, shape)
    _check.check_same_device(
        op, x, weight=weight, lora_A=a, lora_B=b, magnitude=magnitude, norms=norms
    )
    rows = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((rows, _lora_launch.padded(r)))


def _dora_reference(*args: Any) -> tuple[Tensor, Tensor]:
    _dora_fake(*args)
    x, weight, a, b, magnitude, norms, scale, *quantized = args
    y, z = _product(x, weight, a, b, scale, *quantized)
    return y.mul_(column_scale(magnitude, norms)), z


def _dora_backward_fake(
    grad_y: Tensor, x: Tensor, z: Tensor | None, y: Tensor | None, weight: Tensor, a: Tensor, b: Tensor,
    magnitude: Tensor, norms: Tensor, scale: float, absmax: Tensor | None,
    nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        tensor.new_empty(tensor.shape if want else (0,))
        for tensor, want in zip((x, a, b, magnitude), wanted, strict=True)
    )


def _dora_backward_reference(
    grad_y: Tensor, x: Tensor, z: Tensor | None, y: Tensor | None, weight: Tensor, a: Tensor, b: Tensor,
    magnitude: Tensor, norms: Tensor, scale: float, absmax: Tensor | None,
    nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    want_x, want_a, want_b, want_m = wanted
    quantized = (absmax, nested_absmax, offset, blocksize)
    scaled = torch.mul(grad_y, column_scale(magnitude, norms)).to(grad_y.dtype)
    grad_x, _, grad_a, grad_b = _library.OPS["lora_linear_backward"].reference(
        scaled, x, z, weight, a, b, scale, 0.0, None, *quantized, [want_x, False, want_a, want_b]
    )
    grad_m = magnitude.new_empty(0)
    if want_m:  # from the product made again: no y is wrong, nor c 0
        product = _product(x, weight, a, b, scale, *quantized)[0].to(norms.dtype) * grad_y
        sums = product.reshape(-1, len(norms)).sum(0)
        grad_m = (sums / _divisor(magnitude, norms)).to(magnitude.dtype)
    return grad_x, grad_a, grad_b, grad_m


def _dora_backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    _, x, _, _, _, a, b, magnitude, *_ = args
    result: tuple[Tensor, ...]
    if reason := _dora_launch.missing_linear(x, a, b, magnitude):
        result = _library.fall_back("dora_linear_backward", reason, *args)
    else:
        result = _dora_launch.backward(*args)
    return result


_dora_backward = _library.define(
    "dora_linear_backward(Tensor grad_y, Tensor x, Tensor? z, Tensor? y, Tensor weight, Tensor a, "
    "Tensor b, Tensor magnitude, Tensor norms, float scale, Tensor? absmax, Tensor? nested_absmax, "
    "Tensor? offset, int blocksize, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_dora_backward_fake,
    reference=_dora_backward_reference,
    kernel=_dora_backward_kernel,
    devices=("CUDA",),
)


class _DoraLinear(torch.autograd.Function):
    """Saves the factors, the norms and, for those that are wanted of the results in brackets, x unless it can
    be made again (dA, dm) and z (dB); of y no more than the storage that the caller has, and its version."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, below, x, weight, a, b, magnitude, norms, scale, absmax, nested_absmax, offset,
        blocksize,
    ):  # fmt: skip
        constants = (scale, absmax, nested_absmax, offset, blocksize)
        y, z = below(x, weight, a, b, magnitude, norms, *constants)
        _, _, want_a, want_b, want_m = ctx.needs_input_grad[1:6]
        reads_x = want_a or want_m
        ctx.remake = recipe(x) if reads_x else None
        # Not among the saved tensors, which must not change. But hooks on those, that offload or make
        # things again, are to have it, and then autograd watches no version.
        ctx.y, ctx.version, held = None, y._version, None
        if want_m:
            if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
                ctx.y = y.detach()
            else:
                held = y.detach()
        ctx.save_for_backward(
            x if reads_x and ctx.remake is None else None, z if want_b else None, held,
            weight, a, b, magnitude, norms, absmax, nested_absmax, offset,
        )  # fmt: skip
        ctx.constants = (scale, blocksize)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y, _grad_z):  # type: ignore[no-untyped-def]
        want_x, _, want_a, want_b, want_m = ctx.needs_input_grad[1:6]
        wanted = (want_x, want_a, want_b, want_m)
        if grad_y is None or not any(wanted):
            return (None,) * 12
        x, z, y, weight, a, b, magnitude, norms, *quantized = ctx.saved_tensors
        scale, blocksize = ctx.constants
        quantized = (*quantized, blocksize)
        if ctx.remake is not None:
            x = ctx.remake()
        elif x is None:  # of which the shape alone counts then
            x = grad_y.new_empty((*grad_y.shape[:-1], a.shape[1]))
        # The graph may live on after its tensors are freed: what is not one of them is let go of here.
        y, ctx.y = y if ctx.y is None else ctx.y, None
        if want_m and (y is None or y._version != ctx.version):
            y = _dora(x.detach(), weight, a, b, magnitude, norms, scale, *quantized)[0]
        grad_x, grad_a, grad_b, grad_m = _dora_backward(
            grad_y, x, z, y if want_m else None, weight, a, b, magnitude, norms, scale, *quantized,
            wanted,
        )  # fmt: skip
        return (
            None, grad_x if want_x else None, None, grad_a if want_a else None,
            grad_b if want_b else None, grad_m if want_m else None, *(None,) * 6,
        )  # fmt: skip


def _dora_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, a, b, magnitude, *_ = args
    result: tuple[Tensor, Tensor]
    if reason := _dora_launch.missing_linear(x, a, b, magnitude):
        result = _library.fall_back("dora_linear", reason, *args)
    else:
        _dora_fake(*args)
        result = _dora_launch.forward(*args)
    return result


_dora = _library.define(
    "dora_linear(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor magnitude, Tensor norms, "
    "float scale, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int blocksize) "
    "-> (Tensor, Tensor)",
    fake=_dora_fake,
    reference=_dora_reference,
    kernel=_dora_kernel,
    devices=("CUDA",),
    autograd=_DoraLinear,
)


def _fused(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, norms: Tensor) -> bool:
    """Whether one op serves; told from what a trace knows as well.

    bfloat16 has the range in which c W and y keep their digits for any c.
    """
    fits = _dora_launch.BUILT and x.is_cuda and x.dtype is torch.bfloat16
    fits = fits and a.dtype is b.dtype and norms.dtype is torch.float32
    sizes = x.shape[-1] % 8 == 0 and b.shape[0] % 8 == 0 and min(*b.shape, x.shape[-1]) > 0
    return fits and sizes and not weight.requires_grad


def dora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    *,
    scale: float,
    absmax: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    blocksize: int = 64,
) -> Tensor:
    """y = c * (x W^T + s x A^T B^T), c = m / norms; differentiable in x, W, A, B and m.

    Computed as `lora_linear` is, whose two products these are. Where no CUDA kernels serve (all but
    bfloat16), and for a W that is trained, the result of that op is scaled by `adapter_scale`.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight: [N, K] of x's dtype; or, with `absmax`, NF4 bytes uint8 [ceil(N K / 2), 1].
        a: lora_A [R, K].
        b: lora_B [N, R].
        magnitude: m [N].
        norms: ||W + s B A|| [N], see `dora_norms`; they are rounded to m's dtype, and 0 counts as 1.
        scale: s.
        absmax: scales of an NF4 weight, as the next three; see `lora_linear`.
        nested_absmax: float32 [ceil(B / 256)].
        nested_offset: float32 scalar.
        blocksize: elements that share a scale.

    Returns:
        [..., N] of the compute dtype.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dense weight's dtype is not the compute dtype.
        QuantStateError: an NF4 weight's parts do not fit [N, K].
        UnsupportedError: x is a nested tensor.
    """
    _library.refuse_nested("dora_linear", x)
    x, weight = cast_for_autocast(x, weight)
    y: Tensor
    if _fused(x, weight, a, b, norms):
        quantized = (absmax, nested_absmax, nested_offset, blocksize)
        y = _dora(x, weight, a, b, magnitude, norms, scale, *quantized)[0]
        return y
    y = lora_linear(
        x, weight, a, b, scale=scale, absmax=absmax, nested_absmax=nested_absmax,
        nested_offset=nested_offset, blocksize=blocksize,
    )  # fmt: skip
    columns = column_scale(magnitude, norms)
    return adapter_scale(y, columns) if torch.is_grad_enabled() else y.mul_(columns)
