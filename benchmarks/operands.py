# SPDX-License-Identifier: Apache-2.0
"""The tensors that all providers of a case get, and what they must compute from them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import PlainLora, frozen_linear, plain
from benchmarks.blocks import Block
from benchmarks.cases import BLOCKSIZE, DROPOUT, SCALE, Case
from pyfast.ops import NestedScales, nf4_nest, nf4_quantize
from pyfast.ops._nf4_format import NEST_MAP, NF4_CODE

Keep = Callable[[Tensor], Tensor]
"""What dropout multiplies the elements of a tensor with; each call draws anew."""


@dataclass
class Operands:
    """The tensors of one copy of a case; a field that the case has no use for stays empty.

    Attributes:
        w: the weight of a case with one; dense, beside NF4 bytes exactly their values.
        inputs: x, and what else a block reads, by the names in `Case.linears`.
        dys: gradients of the outputs.
        weights, factors: path of each adapted linear to its W, and to A and B.
        parts: of a block or model in NF4, path of each linear to its weight alone.
        extra: other tensors with a gradient.
        model: the frozen model of a training step, shared by all providers.
    """

    case: Case
    dtype: torch.dtype
    w: Tensor | None = None
    packed: Tensor | None = None
    absmax: Tensor | None = None
    nest: NestedScales | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    dys: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    parts: dict[str, Operands] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    model: Any = None

    @property
    def x(self) -> Tensor:
        """The input of a case with one."""
        return self.inputs["x"]

    @functools.cached_property
    def scales(self) -> dict[str, Any]:
        """What pyfast's ops take beside a weight in NF4; nothing for a dense one."""
        if self.packed is None:
            return {}
        if self.nest is None:
            return {"absmax": self.absmax}
        codes, absmax, offset = self.nest
        return {"absmax": codes, "nested_absmax": absmax, "nested_offset": offset}

    def leaves(self) -> list[Tensor]:
        """What has a gradient in mode fwdbwd, in the order that all providers report it."""
        factors = itertools.chain.from_iterable(self.factors.values())
        return [*self.inputs.values(), *factors, *self.extra.values()]


class Normal:
    """Draws normal values from one seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int, std: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=self.generator, device=self.device)
        return values.mul_(std).to(self.dtype)

    def weight(self, n: int, k: int) -> Tensor:
        """A matrix that keeps the variance of what it is multiplied with."""
        return self(n, k, std=1 / math.sqrt(k))

    def factors(self, n: int, k: int, r: int) -> tuple[Tensor, Tensor]:
        """A and B of an adapter."""
        return self.weight(r, k), self(n, r, std=0.5)


def make_operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """Random operands of one copy."""
    normal = Normal(dtype, device, seed)
    s = case.shape
    m, n, k, r = (s.get(letter, 0) for letter in "mnkr")
    operands = Operands(case, dtype)
    if n:
        operands.w = normal.weight(n, k)
        if case.nf4 and case.op != "nf4_quantize":
            _quantize(operands)
    operands.inputs = {name: normal(m, width) for name, width in case.inputs.items()}
    operands.dys = [normal(m, width) for width in case.outputs]
    if case.adapted:
        for path, _, n_out, k_in in case.linears:
            weight = normal.weight(n_out, k_in) if operands.w is None else operands.w
            if case.nf4 and operands.w is None:
                operands.parts[path] = quantized(weight)
                weight = operands.parts[path].w
            operands.weights[path] = weight
            operands.factors[path] = normal.factors(n_out, k_in, r)
    elif case.op == "dora_linear":
        a, b = normal.factors(n, k, r)
        operands.extra = {"a": a, "b": b, "magnitude": normal(n, std=0.1) + 2}
    elif case.op == "adapter_scale":
        operands.extra["scale"] = normal(k)
    elif case.op == "scaled_linear":
        operands.extra["scale"] = 1 + normal(k, std=0.3).float()  # as IA3's parameter
    elif case.op == "adapter_bottleneck":
        operands.extra["down"] = normal.weight(r, k)
        operands.extra["up"] = normal.weight(k, r)
        operands.extra["norm"] = normal(k, std=0.1) + 1
    return operands


def _quantize(operands: Operands) -> None:
    """Make NF4 bytes of the weight, and the weight what they say."""
    operands.packed, operands.absmax = nf4_quantize(operands.w, BLOCKSIZE)
    if operands.case.nested:
        operands.nest = nf4_nest(operands.absmax)
    operands.w = decode(operands).to(operands.dtype)


def quantized(w: Tensor) -> Operands:
    """A weight in NF4 with nested scales, and dense with the same values."""
    n, k = w.shape
    case = Case("part", "nf4_linear", (), {"n": n, "k": k}, nf4=True, nested=True)
    made = Operands(case, w.dtype, w=w)
    _quantize(made)
    return made


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 NF4 values and the 256 of nested scales, on a device."""
    return NF4_CODE.to(device), NEST_MAP.to(device)


def decode(operands: Operands, dtype: torch.dtype = torch.float64) -> Tensor:
    """The values of NF4 bytes, written out from the format: float32 scales, the product in `dtype`."""
    packed, scales = operands.packed.view(-1), operands.absmax
    nf4, nest = tables(packed.device)
    if operands.nest is not None:
        codes, absmax, offset = operands.nest
        groups = absmax.repeat_interleave(256)[: codes.numel()]
        scales = nest[codes.int()] * groups + offset
    table = nf4.to(dtype)
    values = torch.stack([table[(packed >> 4).int()], table[(packed & 15).int()]], dim=1)
    values = values.view(-1, BLOCKSIZE).mul_(scales[:, None].to(dtype))
    return values.view(operands.case.shape["n"], operands.case.shape["k"])


def oracle(operands: Operands, mode: str, keep: Keep | None = None) -> list[Tensor]:
    """fp64 outputs (and gradients) of the linear and adapter cases from the rounded operands.

    Args:
        operands: of the first copy.
        mode: fwd or fwdbwd.
        keep: what the dropout of each LoRA linear multiplies its input with, called in their order; the
            outputs of dropout itself are what it gives where it keeps.
    """
    if operands.case.adapted:
        return _lora_oracle(operands, mode, keep)
    leaves = [leaf.detach().double().requires_grad_(mode == "fwdbwd") for leaf in operands.leaves()]
    x, rest = leaves[0], leaves[1:]
    op = operands.case.op
    if op == "nf4_linear":
        y = x @ operands.w.double().t()
    elif op == "dora_linear":
        a, b, magnitude = rest
        total = operands.w.double() + SCALE * b @ a
        norms = torch.linalg.vector_norm(total.detach(), dim=1)
        y = (
            magnitude
            / norms.to(operands.dtype)
            * (x @ operands.w.double().t() + SCALE * x @ a.t() @ b.t())
        )
    elif op == "dropout":
        y = x / (1 - DROPOUT)
    elif op == "adapter_scale":
        y = x * rest[0]
    elif op == "scaled_linear":
        y = (x * rest[0]) @ operands.w.double().t()
    else:
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], rest[2])
        y = x + torch.nn.functional.silu(normed @ rest[0].t()) @ rest[1].t()
    return _with_gradients([y], leaves, operands, mode)


def _lora_oracle(operands: Operands, mode: str, keep: Keep | None) -> list[Tensor]:
    case = operands.case
    inputs = {name: x.detach().double() for name, x in operands.inputs.items()}
    for x in inputs.values():
        x.requires_grad_(mode == "fwdbwd")
    block = Block(
        case.op, {path: frozen_linear(w.double()) for path, w in operands.weights.items()}
    )
    doubles = {path: (a.double(), b.double()) for path, (a, b) in operands.factors.items()}
    parameters = plain(block, doubles)
    if keep is not None:
        for module in block.modules():
            if isinstance(module, PlainLora):
                module.drop = lambda x: x * keep(x.detach().to(operands.dtype)).double()
    return _with_gradients(block(inputs), [*inputs.values(), *parameters], operands, mode)


def _with_gradients(
    ys: list[Tensor], leaves: list[Tensor], operands: Operands, mode: str
) -> list[Tensor]:
    outputs = [y.detach() for y in ys]
    if mode == "fwd":
        return outputs
    return [*outputs, *torch.autograd.grad(ys, leaves, [dy.double() for dy in operands.dys])]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """max |got - want| / max |want|, the worst over the tensors."""
    worst = 0.0
    for ours, true in zip(got, want, strict=True):
        if ours.shape != true.shape:
            return math.inf
        error = (ours.double() - true.double()).abs().max() / true.double().abs().max()
        worst = max(worst, error.item() if error.isfinite() else math.inf)
    return worst
