# SPDX-License-Identifier: Apache-2.0
"""What is measured: one registry of cases, with their operands and their oracles.

Letters: M tokens, N out features, K in features, R rank.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyfast.ops import NestedScales, nf4_nest, nf4_quantize
from pyfast.ops._nf4_format import NEST_MAP, NF4_CODE

BLOCKSIZE = 64
SCALE = 2.0
DROPOUT = 0.1


@dataclass(frozen=True)
class Case:
    """One measured problem.

    Attributes:
        name: the op, then what distinguishes the case, separated by slashes.
        op: the family that providers register for.
        covers: public ops of pyfast that the case exercises.
        modes: "fwd", and "fwdbwd" where the op has a gradient.
        shape: the letters above to sizes.
        nf4: the weight is stored in NF4. nested: with 8-bit scales.
        tolerance: largest max_err that is still the same computation.
    """

    name: str
    op: str
    covers: tuple[str, ...]
    shape: dict[str, int]
    modes: tuple[str, ...] = ("fwd",)
    nf4: bool = False
    nested: bool = False
    tolerance: float = 0.05

    def flops(self, mode: str) -> int:
        """Floating-point operations of the matrix products; a frozen weight has no gradient."""
        s = self.shape
        if "n" not in s or "m" not in s:
            return 0
        dense = 2 * s["m"] * s["n"] * s["k"]
        low_rank = 2 * s["m"] * s.get("r", 0) * (s["n"] + s["k"])
        return dense + low_rank if mode == "fwd" else 2 * dense + 3 * low_rank

    def bytes(self, mode: str, itemsize: int) -> int:
        """Bytes that must move once: weights in their stored form, inputs and outputs."""
        s = self.shape
        m, n, k, r = (s.get(letter, 0) for letter in "mnkr")
        numel = n * k
        stored = numel * itemsize
        packed = numel // 2 + numel // BLOCKSIZE * (1 if self.nested else 4)
        if self.op == "copy":
            return 2 * stored
        if self.op in ("nf4_quantize", "nf4_dequantize"):
            return packed + stored
        if self.op == "dropout" or self.op.startswith("adapter"):
            return 2 * m * k * itemsize + 2 * k * r * itemsize
        weight = packed if self.nf4 else stored
        forward = weight + (m * (n + k) + r * (n + k)) * itemsize
        # Backward reads dy, the weight and, for the adapter's gradients, x; it writes dx, dA and dB.
        backward = weight + (m * (n + k) + (m * k + 2 * r * (n + k) if r else 0)) * itemsize
        return forward if mode == "fwd" else forward + backward


@dataclass
class Operands:
    """The tensors of one copy of a case; a field that the case has no use for stays None."""

    case: Case
    dtype: torch.dtype
    w: Tensor | None = None
    packed: Tensor | None = None
    absmax: Tensor | None = None
    nest: NestedScales | None = None
    x: Tensor | None = None
    dy: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self) -> list[Tensor]:
        """What has a gradient in mode fwdbwd, in the order that all providers report it."""
        tensors = [self.x, self.a, self.b, *self.extra.values()]
        return [t for t in tensors if t is not None]


def make_operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """Random operands of one copy. A dense `w` beside NF4 bytes holds exactly their values."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(std).to(dtype)

    s = case.shape
    m, n, k, r = (s.get(letter, 0) for letter in "mnkr")
    operands = Operands(case, dtype)
    if n:
        operands.w = normal(n, k, std=1 / math.sqrt(k))
    if case.nf4 and case.op != "nf4_quantize":
        operands.packed, operands.absmax = nf4_quantize(operands.w, BLOCKSIZE)
        if case.nested:
            operands.nest = nf4_nest(operands.absmax)
        operands.w = decode(operands).to(dtype)
    if m:
        operands.x = normal(m, k)
        operands.dy = normal(m, n or k)
    if case.op == "lora_linear":
        operands.a = normal(r, k, std=1 / math.sqrt(k))
        operands.b = normal(n, r, std=0.5)
    elif case.op == "adapter_scale":
        operands.extra["scale"] = normal(k)
    elif case.op == "adapter_bottleneck":
        operands.extra["down"] = normal(r, k, std=1 / math.sqrt(k))
        operands.extra["up"] = normal(k, r, std=1 / math.sqrt(r))
    return operands


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


def oracle(operands: Operands, mode: str) -> list[Tensor]:
    """fp64 outputs (and gradients) of the linear and adapter cases from the rounded operands.

    Those of dropout are what it gives where it keeps.
    """
    leaves = [leaf.double().requires_grad_(mode == "fwdbwd") for leaf in operands.leaves()]
    x, rest = leaves[0], leaves[1:]
    op = operands.case.op
    if op == "nf4_linear":
        y = x @ operands.w.double().t()
    elif op == "lora_linear":
        y = x @ operands.w.double().t() + SCALE * (x @ rest[0].t()) @ rest[1].t()
    elif op == "dropout":
        y = x / (1 - DROPOUT)
    elif op == "adapter_scale":
        y = x * rest[0]
    else:
        y = x + torch.nn.functional.silu(x @ rest[0].t()) @ rest[1].t()
    if mode == "fwd":
        return [y]
    return [y.detach(), *torch.autograd.grad(y, leaves, operands.dy.double())]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """max |got - want| / max |want|, the worst over the tensors."""
    worst = 0.0
    for ours, true in zip(got, want, strict=True):
        if ours.shape != true.shape:
            return math.inf
        error = (ours.double() - true.double()).abs().max() / true.double().abs().max()
        worst = max(worst, error.item() if error.isfinite() else math.inf)
    return worst


def _weights(op: str, sizes: list[tuple[int, int]]) -> Iterator[Case]:
    for nested in (False, True):
        kind = "nested" if nested else "flat"
        covers = (op, "nf4_nest") if nested and op == "nf4_quantize" else (op,)
        # One code step apart is possible for a quantiser that rounds a tie differently.
        tolerance = 0.25 if op == "nf4_quantize" else 0.01
        for n, k in sizes:
            yield Case(
                f"{op}/{kind}/{n}x{k}", op, covers, {"n": n, "k": k},
                nf4=True, nested=nested, tolerance=tolerance,
            )  # fmt: skip


def _nf4_linears(sizes: list[tuple[int, int]], rows: list[int], nested: bool) -> Iterator[Case]:
    for n, k in sizes:
        for m in rows:
            kind = "nested" if nested else "flat"
            yield Case(
                f"nf4_linear/{kind}/{n}x{k}/m{m}", "nf4_linear", ("nf4_linear",),
                {"m": m, "n": n, "k": k}, ("fwd", "fwdbwd"), nf4=True, nested=nested,
            )  # fmt: skip


def _loras(sizes: list[tuple[int, int]], rows: list[int], ranks: list[int]) -> Iterator[Case]:
    for base in ("dense", "nf4"):
        for n, k in sizes:
            for m in rows:
                for r in ranks:
                    yield Case(
                        f"lora_linear/{base}/{n}x{k}/r{r}/m{m}", "lora_linear", ("lora_linear",),
                        {"m": m, "n": n, "k": k, "r": r}, ("fwd", "fwdbwd"),
                        nf4=base == "nf4", nested=base == "nf4",
                    )  # fmt: skip


def _adapters(sizes: list[tuple[int, int]], r: int) -> Iterator[Case]:
    for m, k in sizes:
        modes = ("fwd", "fwdbwd")
        covers = ("adapter_scale",)
        yield Case(f"adapter_scale/{m}x{k}", "adapter_scale", covers, {"m": m, "k": k}, modes)
        name, shape = f"adapter_bottleneck/{m}x{k}/r{r}", {"m": m, "k": k, "r": r}
        yield Case(name, "adapter_bottleneck", ("adapter_bottleneck",), shape, modes)


def _dropouts(sizes: list[tuple[int, int]]) -> Iterator[Case]:
    for m, k in sizes:
        shape = {"m": m, "k": k}
        yield Case(f"dropout/{m}x{k}", "dropout", ("dropout",), shape, ("fwd", "fwdbwd"))


def _tiny() -> Iterator[Case]:
    size = [(64, 128)]
    for case in (
        *_weights("nf4_quantize", size),
        *_weights("nf4_dequantize", size),
        *_nf4_linears(size, [4], nested=False),
        *_nf4_linears(size, [4], nested=True),
        *_loras(size, [4], [8]),
        *_adapters([(4, 128)], 8),
        *_dropouts([(4, 128)]),
    ):
        yield Case(**{**vars(case), "name": f"tiny/{case.name}"})


def all_cases(device: str) -> list[Case]:
    """Every case of a device type. Those under `tiny/` only try the runner itself."""
    square = [(4096, 4096)]
    if device == "cpu":
        return [
            *_weights("nf4_quantize", square),
            *_weights("nf4_dequantize", square),
            *_nf4_linears(square, [1, 16, 64, 256, 1024], nested=False),
            *_loras(square, [64, 512], [16]),
            *_adapters([(1024, 4096)], 64),
            *_dropouts([(1024, 4096)]),
            *_tiny(),
        ]
    # Llama-3-8B's and 70B's projections.
    matrices = [*square, (14336, 4096), (28672, 8192)]
    layers = [*square, (14336, 4096), (4096, 14336), (1024, 4096)]
    return [
        *(Case(f"copy/{n}x{k}", "copy", (), {"n": n, "k": k}) for n, k in matrices),
        *_weights("nf4_quantize", matrices),
        *_weights("nf4_dequantize", matrices),
        *_nf4_linears(matrices, [1, 16, 64, 256], nested=False),
        *_nf4_linears(layers, [512, 2048, 8192], nested=True),
        *_loras(layers, [2048, 8192], [16, 64]),
        *_adapters([(8192, 4096), (8192, 14336)], 64),
        *_dropouts([(8192, 4096), (8192, 14336)]),
        *_tiny(),
    ]


def select(device: str, pattern: str) -> list[Case]:
    """Cases whose name matches a glob; the tiny ones only where the glob begins with `tiny`."""
    tiny = pattern.startswith("tiny")
    return [
        case
        for case in all_cases(device)
        if fnmatch.fnmatchcase(case.name, pattern) and (tiny or not case.name.startswith("tiny/"))
    ]
