# SPDX-License-Identifier: Apache-2.0
"""Who is measured: each provider turns a case into a step, or says why it has none.

frozen        F.linear on the dense weight, gradient of x only (cuBLAS); no adapter: the floor
frozen_lt     the same on cuBLASLt
torch         the plain PyTorch composition of the op
peft          PEFT's LoRA layers, over F.linear or bitsandbytes' Linear4bit
peft_compile  the same through torch.compile
unsloth       PEFT's layers with Unsloth's LoRA kernels in the place of their forwards
bitsandbytes  its functional quantisers and Linear4bit
pyfast        pyfast.ops; in blocks and training steps pyfast.apply

LoRA is in `lora`, DoRA in `dora`, training steps are in `train_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import dora, lora, train_step
from benchmarks.bnb_layers import linear_4bit, quant_state
from benchmarks.cases import BLOCKSIZE, DROPOUT, Case
from benchmarks.operands import Operands, decode, tables
from benchmarks.prepared import Absent, Prepared, need, need_cuda, with_blas
from benchmarks.steps import step_of_one
from pyfast import ops

Prepare = Callable[[Case, str, list[Operands]], Prepared]


def _reader(case: Case, copies: list[Operands]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Results as the oracle has them: where dropout drops, if as often as told, the value is filled in."""
    if case.op != "dropout":
        return list

    def read(out: list[Tensor]) -> list[Tensor]:
        filled = []
        for result, source in zip(out, (copies[0].x, copies[0].dys[0]), strict=False):
            dropped = result == 0
            right = abs(dropped.double().mean().item() - DROPOUT) < 0.09
            filled.append(torch.where(dropped, source / (1 - DROPOUT), result) if right else result)
        return filled

    return read


def _frozen(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op not in ("nf4_linear", "scaled_linear"):
        raise Absent("there is no frozen linear in this case")
    leaves = [[operands.x] for operands in copies]
    step = step_of_one(mode, copies, lambda i: F.linear(copies[i].x, copies[i].w), leaves)
    return Prepared(step, list if case.op == "nf4_linear" else None, with_blas("cublas"))


def _frozen_lt(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    prepared = _frozen(case, mode, copies)
    need_cuda("cuBLASLt", copies[0].x)
    return Prepared(prepared.step, prepared.read, with_blas("cublaslt"))


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
        "dropout": lambda o: F.dropout(o.x, DROPOUT),
        "adapter_scale": lambda o: o.x * o.extra["scale"],
        "scaled_linear": lambda o: F.linear((o.x * o.extra["scale"]).to(o.dtype), o.w),
        "adapter_bottleneck": _bottleneck,
    }
    forward = forwards[case.op]
    step = step_of_one(mode, copies, lambda i: forward(copies[i]))
    return Prepared(step, _reader(case, copies))


def _bottleneck(o: Operands) -> Tensor:
    normed = F.layer_norm(o.x, o.x.shape[-1:], o.extra["norm"])
    return o.x + F.linear(F.silu(F.linear(normed, o.extra["down"])), o.extra["up"])


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


def _bitsandbytes(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    need("bitsandbytes")
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
        states = [quant_state(operands) for operands in copies]
        return Prepared(lambda i: [bnb.dequantize_4bit(copies[i].packed, states[i])], list)
    if case.op == "nf4_linear":
        layers = [linear_4bit(operands).train(mode == "fwdbwd") for operands in copies]
        return Prepared(step_of_one(mode, copies, lambda i: layers[i](copies[i].x)), list)
    raise _no_op("bitsandbytes", case)


def _no_op(name: str, case: Case) -> Absent:
    return Absent(f"{name} has no {case.op}")


def _pyfast(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op == "copy":
        raise _no_op("pyfast", case)
    if case.op == "nf4_quantize":

        def quantize(i: int) -> tuple[Tensor, Tensor, ops.NestedScales | None]:
            packed, absmax = ops.nf4_quantize(copies[i].w, BLOCKSIZE)
            return packed, absmax, ops.nf4_nest(absmax) if case.nested else None

        return Prepared(quantize, lambda out: [_decoded(case, *out)])
    if case.op == "nf4_dequantize":
        shape, dtype = copies[0].w.shape, copies[0].dtype

        def dequantize(i: int) -> list[Tensor]:
            o = copies[i]
            return [ops.nf4_dequantize(o.packed, shape=shape, dtype=dtype, **o.scales)]

        return Prepared(dequantize, list)
    forwards: dict[str, Callable[[Operands], Tensor]] = {
        "nf4_linear": lambda o: ops.nf4_linear(
            o.x, o.packed, out_features=o.w.shape[0], **o.scales
        ),
        "dropout": lambda o: ops.dropout(o.x, DROPOUT),
        "adapter_scale": lambda o: ops.adapter_scale(o.x, o.extra["scale"]),
        "scaled_linear": lambda o: ops.scaled_linear(o.x, o.w, o.extra["scale"]),
        "adapter_bottleneck": lambda o: ops.adapter_bottleneck(
            o.x, o.extra["down"], o.extra["up"], norm_weight=o.extra["norm"]
        ),
    }
    forward = forwards[case.op]
    step = step_of_one(mode, copies, lambda i: forward(copies[i]))
    return Prepared(step, _reader(case, copies))


PROVIDERS: dict[str, Prepare] = {
    "frozen": _frozen,
    "frozen_lt": _frozen_lt,
    "torch": _torch,
    "bitsandbytes": _bitsandbytes,
    "pyfast": _pyfast,
}
NAMES = list(dict.fromkeys([*lora.PROVIDERS, *PROVIDERS]))
"""All providers."""


def prepare(name: str, case: Case, mode: str, copies: list[Operands]) -> Prepared:
    """A provider's step for a case.

    Raises:
        Absent: it has none.
    """
    if case.op == "train_step":
        return train_step.prepare(name, case, copies[0])
    table = lora.PROVIDERS if case.adapted else PROVIDERS
    table = dora.PROVIDERS if case.op == "dora_linear" else table
    if name not in table:
        raise _no_op(name, case)
    return table[name](case, mode, copies)
