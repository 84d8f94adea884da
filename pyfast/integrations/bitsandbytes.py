# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' `Linear4bit` as a weight format: its bytes are read in place, never re-quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfast.nn import NF4Weight, register_format
from pyfast.ops._check import NEST_BLOCK


def view_linear4bit(module: nn.Module) -> NF4Weight | None:
    """The NF4 weight of a quantised `Linear4bit`; None where `unsupported_reason` says why."""
    if unsupported_reason(module):
        return None
    weight: Any = module.weight
    state = weight.quant_state
    return NF4Weight(
        packed=weight.data.view(torch.uint8).view(-1, 1),
        absmax=state.absmax,
        shape=tuple(state.shape),
        original_dtype=state.dtype,
        blocksize=state.blocksize,
        nested_absmax=state.state2.absmax if state.nested else None,
        nested_offset=state.offset.float() if state.nested else None,
        bias=module.bias,  # type: ignore[arg-type]
        compute_dtype=module.compute_dtype,  # type: ignore[arg-type]
    )


def unsupported_reason(module: nn.Module) -> str:
    """Why a `Linear4bit` cannot be served by our kernels; empty if it can."""
    if "forward" in vars(module):
        return "its forward was replaced, as hooks that move weights between devices do"
    state: Any = getattr(module.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet; move the model to its device first"
    if state.quant_type != "nf4":
        return f"its quant_type is {state.quant_type!r}; only 'nf4' is served"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked its weight for CPU inference; model.state_dict() unpacks it"
    if state.nested and state.state2.blocksize != NEST_BLOCK:
        return f"its nested blocksize is {state.state2.blocksize}; only {NEST_BLOCK} is served"
    if len(state.shape) != 2:
        return f"its weight has shape {list(state.shape)}, not two dimensions"
    return ""


register_format("bitsandbytes.nn.modules.Linear4bit", view_linear4bit)
