# SPDX-License-Identifier: Apache-2.0
"""One DoRA linear: what it must compute, and its providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adapters import frozen_linear
from benchmarks.cases import SCALE, Case
from benchmarks.operands import Operands
from benchmarks.prepared import Prepared, need
from benchmarks.steps import step_of_one
from pyfast import ops


def _torch(o: Operands) -> Tensor:
    a, b, magnitude = o.extra.values()
    wide = torch.promote_types(o.dtype, torch.float32)
    total = o.w.to(wide) + SCALE * b.detach().to(wide) @ a.detach().to(wide)
    c = magnitude / torch.linalg.vector_norm(total, dim=1).to(o.dtype)
    return c * (F.linear(o.x, o.w) + SCALE * F.linear(F.linear(o.x, a), b))


def _pyfast(o: Operands) -> Tensor:
    a, b, magnitude = o.extra.values()
    norms = ops.dora_norms(o.w, a, b, scale=SCALE)
    return ops.dora_linear(o.x, o.w, a, b, magnitude, norms, scale=SCALE)


def _peft(case: Case, mode: str, copies: list[Operands]) -> Prepared:
    need("peft")
    import peft

    layers: list[nn.Module] = []
    leaves = []
    for operands in copies:
        model: Any = nn.ModuleDict({"proj": frozen_linear(operands.w)})
        rank = case.shape["r"]
        settings = {"r": rank, "lora_alpha": int(SCALE * rank), "target_modules": ["proj"]}
        model = peft.inject_adapter_in_model(peft.LoraConfig(use_dora=True, **settings), model)
        layer: Any = model["proj"]
        parts = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
        for part, value in zip(parts, operands.extra.values(), strict=True):
            part["default"].weight = nn.Parameter(value.detach().clone())
        layers.append(layer)
        leaves.append([operands.x, *(part["default"].weight for part in parts)])
    step = step_of_one(mode, copies, lambda i: layers[i](copies[i].x), leaves)
    return Prepared(step, list)


def _functional(
    forward: Callable[[Operands], Tensor],
) -> Callable[[Case, str, list[Operands]], Prepared]:
    return lambda _, mode, copies: Prepared(
        step_of_one(mode, copies, lambda i: forward(copies[i])), list
    )


PROVIDERS: dict[str, Callable[[Case, str, list[Operands]], Prepared]] = {
    "torch": _functional(_torch),
    "peft": _peft,
    "pyfast": _functional(_pyfast),
}
