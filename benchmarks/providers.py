# SPDX-License-Identifier: Apache-2.0
"""Who is measured: each provider turns a case into a step, or says why it has none.

frozen        F.linear on the dense weight, gradient of x only (cuBLAS); no adapter: the floor
frozen_lt     the same on cuBLASLt
torch         the plain PyTorch composition of the op
peft          PEFT's LoRA layer, over F.linear or bitsandbytes' Linear4bit
bitsandbytes  its functional quantisers and Linear4bit
pyfast        pyfast.ops
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import BLOCKSIZE, DROPOUT, SCALE, Case, Operands, decode, tables
from benchmarks.timing import Step
from pyfast import ops


class Absent(Exception):
    """This provider does not serve the case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """A provider's step for one case and mode.

    Attributes:
        step: does the work on copy i.
        read: the step's result as the tensors that the oracle has; None: it computes something else.
        around: runs what it is given with the provider's global settings in place.
    """

    step: Step
    read: Callable[[Any], list[Tensor]] | None
    around: Callable[[Callable[[], object]], object] = lambda work: work()


Forward = Callable[[int], Tensor]
Leaves = list[list[Tensor]]


def _linear(mode: str, copies: list[Operands], forward: Forward, leaves: Leaves) -> Step:
    """A step of `forward`, and in mode fwdbwd the gradients of its leaves."""
    if mode == "fwd":

        def step(i: int) -> list[Tensor]:
            with torch.no_grad():
                return [forward(i)]
    else:

        def step(i: int) -> list[Tensor]:
            y = forward(i)
            return [y, *torch.autograd.grad(y, leaves[i], copies[i].dy)]

    return step


def _leaves(copies: list[Operands]) -> Leaves:
    return [operands.leaves() for operands in copies]


def _reader(case: Case, copies: list[Operands]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Results as the oracle has them: where dropout drops, if as often as told, the value is filled in."""
    if case.op != "dropout":
        return list

    def read(out: list[Tensor]) -> list[Tensor]:
        filled = []
        for result, source in zip(out, (copies[0].x, copies[0].dy), strict=False):
            dropped = result == 0
            right = abs(dropped.double().mean().item() - DROPOUT) < 0.09
            filled.append(torch.where(dropped, source / (1 - DROPOUT), result) if right else result)
        return filled

    return read


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")


# --- frozen -------------------------------------------------------------------------------------


def _frozen(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op not in ("nf4_linear", "lora_linear"):
        raise Absent("there is no frozen linear in this case")
    leaves = [[operands.x] for operands in copies]
    step = _linear(mode, copies, lambda i: F.linear(copies[i].x, copies[i].w), leaves)
    return Prepared(step, list if case.op == "nf4_linear" else None, _with_blas("cublas"))


def _frozen_lt(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    prepared = _frozen(case, mode, copies)
    if copies[0].x.device.type != "cuda":
        raise Absent("cuBLASLt needs a CUDA device")
    return Prepared(prepared.step, prepared.read, _with_blas("cublaslt"))


def _with_blas(library: str) -> Callable[[Callable[[], object]], object]:
    def around(work: Callable[[], object]) -> object:
        if not torch.cuda.is_available():
            return work()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return work()
        finally:
            torch.backends.cuda.preferred_blas_library("default")

    return around


# --- torch --------------------------------------------------------------------------------------


def _torch(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op == "copy":
        return Prepared(lambda i: [copies[i].w.clone()], list)
    if case.op == "nf4_quantize":
        return _torch_quantize(case, copies)
    if case.op == "nf4_dequantize":
        dtype = copies[0].dtype
        return Prepared(lambda i: [decode(copies[i], torch.float32).to(dtype)], list)
    forwards: dict[str, Callable[[Operands], Tensor]] = {
        "nf4_linear": lambda o: F.linear(o.x, decode(o, torch.float32).to(o.dtype)),
        "lora_linear": lambda o: F.linear(o.x, o.w) + SCALE * F.linear(F.linear(o.x, o.a), o.b),
        "dropout": lambda o: F.dropout(o.x, DROPOUT),
        "adapter_scale": lambda o: o.x * o.extra["scale"],
        "adapter_bottleneck": lambda o: (
            o.x + F.linear(F.silu(F.linear(o.x, o.extra["down"])), o.extra["up"])
        ),
    }
    forward = forwards[case.op]
    step = _linear(mode, copies, lambda i: forward(copies[i]), _leaves(copies))
    return Prepared(step, _reader(case, copies))


def _torch_quantize(case: Case, copies: list[Operands]) -> Prepared:
    if case.nested:
        raise Absent("torch has no 8-bit dynamic map")
    table = tables(copies[0].w.device)[0]
    midpoints = (table[1:] + table[:-1]) / 2

    def step(i: int) -> tuple[Tensor, Tensor]:
        blocks = copies[i].w.view(-1, BLOCKSIZE).float()
        absmax = blocks.abs().amax(dim=1)
        codes = torch.bucketize(blocks / absmax[:, None], midpoints, out_int32=True)
        pairs = codes.to(torch.uint8).view(-1, 2)
        return (pairs[:, :1] << 4) | pairs[:, 1:], absmax

    return Prepared(step, lambda out: [_decoded(case, *out, None)])


def _decoded(case: Case, packed: Tensor, absmax: Tensor, nest: ops.NestedScales | None) -> Tensor:
    return decode(Operands(case, torch.float64, packed=packed, absmax=absmax, nest=nest))


# --- bitsandbytes -------------------------------------------------------------------------------


def _bitsandbytes(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    _need("bitsandbytes")
    import bitsandbytes.functional as bnb

    if case.op == "nf4_quantize":

        def quantize(i: int) -> tuple[Tensor, Any]:
            packed, state = bnb.quantize_4bit(
                copies[i].w, blocksize=BLOCKSIZE, compress_statistics=case.nested, quant_type="nf4"
            )
            return packed, state

        def read(out: tuple[Tensor, Any]) -> list[Tensor]:
            packed, state = out
            if not case.nested:
                return [_decoded(case, packed, state.absmax, None)]
            nest = ops.NestedScales(state.absmax, state.state2.absmax, state.offset)
            return [_decoded(case, packed, state.absmax, nest)]

        return Prepared(quantize, read)
    if case.op == "nf4_dequantize":
        states = [_bnb_state(operands) for operands in copies]
        return Prepared(lambda i: [bnb.dequantize_4bit(copies[i].packed, states[i])], list)
    if case.op == "nf4_linear":
        layers = [_bnb_linear(operands, mode) for operands in copies]
        forward = _linear(mode, copies, lambda i: layers[i](copies[i].x), _leaves(copies))
        return Prepared(forward, list)
    raise Absent("bitsandbytes has no such op")


def _bnb_state(operands: Operands) -> Any:
    """bitsandbytes' description of the operands' NF4 bytes."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    device = operands.packed.device
    common = {
        "shape": operands.w.shape,
        "dtype": operands.dtype,
        "blocksize": BLOCKSIZE,
        "quant_type": "nf4",
        "code": get_4bit_type("nf4", device=device, blocksize=BLOCKSIZE),
    }
    if operands.nest is None:
        return QuantState(absmax=operands.absmax, **common)
    code = create_dynamic_map().to(device)
    inner = QuantState(operands.nest.absmax, blocksize=256, code=code, dtype=torch.float32)
    return QuantState(operands.nest.codes, offset=operands.nest.offset, state2=inner, **common)


def _bnb_linear(operands: Operands, mode: str) -> nn.Module:
    import bitsandbytes as bnb

    n, k = operands.w.shape
    nested = operands.nest is not None
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=operands.dtype, compress_statistics=nested,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.quant_state = _bnb_state(operands)
    layer.weight = bnb.nn.Params4bit(
        # Cloned: on CPU, bitsandbytes repacks the bytes of a layer that only runs forward.
        operands.packed.clone(), requires_grad=False, quant_state=layer.quant_state,
        blocksize=BLOCKSIZE, compress_statistics=nested, quant_type="nf4", module=layer,
        bnb_quantized=True,
    )  # fmt: skip
    return layer.train(mode == "fwdbwd")


# --- peft ---------------------------------------------------------------------------------------


class _Host(nn.Module):
    """The smallest model that PEFT can put an adapter into."""

    def __init__(self, layer: nn.Module, four_bit: bool) -> None:
        super().__init__()
        self.proj = layer
        self.is_loaded_in_4bit = four_bit


def _peft(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op != "lora_linear":
        raise Absent("PEFT has no such layer by itself")
    _need("peft")
    if case.nf4:
        _need("bitsandbytes")
    layers = [_peft_layer(operands, mode) for operands in copies]
    leaves: Leaves = [
        [operands.x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for operands, layer in zip(copies, layers, strict=True)
    ]
    return Prepared(_linear(mode, copies, lambda i: layers[i](copies[i].x), leaves), list)


def _peft_layer(operands: Operands, mode: str) -> Any:
    import peft

    if operands.case.nf4:
        base = _bnb_linear(operands, mode)
    else:
        n, k = operands.w.shape
        base = nn.Linear(k, n, bias=False, device="meta")
        base.weight = nn.Parameter(operands.w, requires_grad=False)
    rank = operands.case.shape["r"]
    config = peft.LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["proj"])
    host = peft.inject_adapter_in_model(config, _Host(base, operands.case.nf4))
    layer = host.proj
    layer.lora_A["default"].weight = nn.Parameter(operands.a.detach())
    layer.lora_B["default"].weight = nn.Parameter(operands.b.detach())
    return layer.train(mode == "fwdbwd")


# --- pyfast -------------------------------------------------------------------------------------


def _pyfast(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op == "copy":
        raise Absent("pyfast has no copy")
    if case.op == "nf4_quantize":

        def quantize(i: int) -> tuple[Tensor, Tensor, ops.NestedScales | None]:
            packed, absmax = ops.nf4_quantize(copies[i].w, BLOCKSIZE)
            return packed, absmax, ops.nf4_nest(absmax) if case.nested else None

        return Prepared(quantize, lambda out: [_decoded(case, *out)])
    scales = [_scales(operands) for operands in copies]
    if case.op == "nf4_dequantize":
        shape, dtype = copies[0].w.shape, copies[0].dtype

        def dequantize(i: int) -> list[Tensor]:
            return [ops.nf4_dequantize(copies[i].packed, shape=shape, dtype=dtype, **scales[i])]

        return Prepared(dequantize, list)
    forwards: dict[str, Callable[[Operands, dict[str, Any]], Tensor]] = {
        "nf4_linear": lambda o, s: ops.nf4_linear(o.x, o.packed, out_features=len(o.w), **s),
        "lora_linear": lambda o, s: ops.lora_linear(
            o.x, o.packed if case.nf4 else o.w, o.a, o.b, scale=SCALE, **s
        ),
        "dropout": lambda o, s: ops.dropout(o.x, DROPOUT),
        "adapter_scale": lambda o, s: ops.adapter_scale(o.x, o.extra["scale"]),
        "adapter_bottleneck": lambda o, s: ops.adapter_bottleneck(
            o.x, o.extra["down"], o.extra["up"]
        ),
    }
    forward = forwards[case.op]
    step = _linear(mode, copies, lambda i: forward(copies[i], scales[i]), _leaves(copies))
    return Prepared(step, _reader(case, copies))


def _scales(operands: Operands) -> dict[str, Any]:
    if not operands.case.nf4:
        return {}
    if operands.nest is None:
        return {"absmax": operands.absmax}
    codes, absmax, offset = operands.nest
    return {"absmax": codes, "nested_absmax": absmax, "nested_offset": offset}


PROVIDERS: dict[str, Callable[[Case, str, list[Operands]], Prepared]] = {
    "frozen": _frozen,
    "frozen_lt": _frozen_lt,
    "torch": _torch,
    "peft": _peft,
    "bitsandbytes": _bitsandbytes,
    "pyfast": _pyfast,
}
