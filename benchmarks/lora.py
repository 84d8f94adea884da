# SPDX-License-Identifier: Apache-2.0
"""The providers of LoRA linears alone and in blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import adapters
from benchmarks.blocks import Block
from benchmarks.bnb_layers import linear_4bit, our_linear
from benchmarks.cases import SCALE, Case
from benchmarks.operands import Keep, Operands
from benchmarks.prepared import Absent, Prepared, need, need_cuda, with_blas
from benchmarks.steps import step_of, step_of_one
from pyfast import ops


def _frozen(library: str, case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if library == "cublaslt":
        need_cuda("cuBLASLt", copies[0].x)
    if case.op == "lora_linear":
        leaves = [[operands.x] for operands in copies]
        step = step_of_one(mode, copies, lambda i: F.linear(copies[i].x, copies[i].w), leaves)
    else:
        step = _in_block(lambda *_: [], case, mode, copies).step
    return Prepared(step, None, with_blas(library))


def _drawn(x: Tensor, p: float) -> Tensor:
    kept = F.dropout(torch.ones_like(x), p) != 0
    return kept.double() / (1 - p)


def _our_drawn(x: Tensor, p: float) -> Tensor:
    return ops.dropout(torch.ones_like(x, dtype=torch.float32), p)


def _in_block(
    adapt: Callable[..., list[nn.Parameter]],
    case: Case,
    mode: str,
    copies: list[Operands],
    *,
    layer: Callable[[Operands], nn.Module] | None = None,
    draw: Callable[[Tensor, float], Tensor] = _drawn,
    batched: bool = False,
    call: Callable[[nn.Module], Any] = lambda module: module,
) -> Prepared:
    """The block of a case with a provider's adapters in it.

    Args:
        adapt: puts the adapters in, see `adapters`.
        case: a LoRA case.
        mode: fwd or fwdbwd.
        copies: the operands.
        layer: makes a frozen layer of NF4 bytes; None: they are dense.
        draw: what dropout multiplies a tensor with.
        batched: x is [1, M, K].
        call: what is called in the place of a module.
    """
    modules, inputs, leaves, dys = [], [], [], []
    for operands in copies:
        linears = {
            path: layer(operands.parts.get(path, operands)) if layer else adapters.frozen_linear(w)
            for path, w in operands.weights.items()
        }
        block = Block(case.op, linears, four_bit=layer is linear_4bit)
        parameters = adapt(block, operands.factors, case.dropout)
        # Dropout is for training; bitsandbytes' layers are faster outside of it.
        block.train(mode == "fwdbwd" or case.dropout > 0)
        # A linear alone is called as such: a block around it would cost host time.
        modules.append(call(block.proj if case.op == "lora_linear" else block))
        fed = operands.inputs
        inputs.append({name: _batch(x) for name, x in fed.items()} if batched else fed)
        leaves.append([*inputs[-1].values(), *parameters])
        dys.append([dy[None] for dy in operands.dys] if batched else operands.dys)

    def forward(i: int) -> list[Tensor]:
        if case.op == "lora_linear":
            return [modules[i](inputs[i]["x"])]
        return modules[i](inputs[i])

    step = step_of(mode, forward, leaves, dys)
    read = (lambda out: [tensor.squeeze(0) for tensor in out]) if batched else list
    return Prepared(step, read, keep=_keep(case, draw))


def _keep(case: Case, draw: Callable[[Tensor, float], Tensor]) -> Keep | None:
    return partial(draw, p=case.dropout) if case.dropout else None


def _batch(x: Tensor) -> Tensor:
    return x.detach()[None].requires_grad_(x.requires_grad)


def _bitsandbytes(case: Case) -> Callable[[Operands], nn.Module] | None:
    """Makes the frozen layers of a case for those who take them from bitsandbytes."""
    if not case.nf4:
        return None
    need("bitsandbytes")
    return linear_4bit


def _peft(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    return _in_block(adapters.peft, case, mode, copies, layer=_bitsandbytes(case))


def _peft_compile(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.nf4:
        raise Absent("PEFT is compiled over dense weights only")
    torch._dynamo.reset()  # a process has few compilations of one code, then torch runs it as it is
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    prepared = _in_block(adapters.peft, case, mode, copies, call=compiled)
    # Compiled dropout draws another mask.
    return Prepared(prepared.step, None if case.dropout else prepared.read)


def _unsloth(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    need_cuda("Unsloth", copies[0].x)
    layer = _bitsandbytes(case)
    return _in_block(adapters.unsloth, case, mode, copies, layer=layer, batched=True)


def _pyfast(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    if case.op != "lora_linear":
        layer = our_linear if case.nf4 else None
        return _in_block(adapters.ours, case, mode, copies, layer=layer, draw=_our_drawn)

    p = case.dropout

    def forward(i: int) -> Tensor:
        o = copies[i]
        weight = o.packed if case.nf4 else o.w
        return ops.lora_linear(o.x, weight, *o.factors["proj"], scale=SCALE, dropout=p, **o.scales)

    return Prepared(step_of_one(mode, copies, forward), list, keep=_keep(case, _our_drawn))


PROVIDERS: dict[str, Callable[[Case, str, list[Operands]], Prepared]] = {
    "frozen": partial(_frozen, "cublas"),
    "frozen_lt": partial(_frozen, "cublaslt"),
    "torch": partial(_in_block, adapters.plain),
    "peft": _peft,
    "peft_compile": _peft_compile,
    "unsloth": _unsloth,
    "pyfast": _pyfast,
}
