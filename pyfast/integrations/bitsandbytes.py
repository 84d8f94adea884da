# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' `Linear4bit` as a weight format: its bytes are read in place, never re-quantised; and how a
saved model says that transformers is to load it through bitsandbytes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from pyfast.nn import NF4Linear, NF4Weight, register_format
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


def quantization_config(model: Any) -> Any:
    """The `quantization_config` that belongs to a transformers model as it is now: which of its linear layers
    are in 4 bits, ours or bitsandbytes'; None where none is. That of another quantiser stays as it is."""
    given: Any = getattr(model.config, "quantization_config", None)
    values: Any = given.to_dict() if hasattr(given, "to_dict") else given
    if values and not values.get("load_in_4bit"):
        return given
    four_bit, dense = _linears(model)
    if not four_bit:
        return None
    if not values:
        layers = [layer for layer in four_bit if isinstance(layer, NF4Linear)]
        values = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(layer.nested_absmax is not None for layer in layers),
            "bnb_4bit_compute_dtype": str(layers[0].original_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    return values | {"llm_int8_skip_modules": dense}


def _linears(model: nn.Module) -> tuple[list[nn.Module], list[str]]:
    """The 4-bit layers, and the paths of those that transformers would otherwise take for such."""
    bnb: Any = sys.modules.get("bitsandbytes.nn.modules")
    library: Any = sys.modules["transformers.pytorch_utils"]
    four_bit, dense = [], []
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear) or (bnb and isinstance(module, bnb.Linear4bit)):
            four_bit.append(module)
        elif isinstance(module, (nn.Linear, library.Conv1D)):
            dense.append(path)
    return four_bit, dense


register_format("bitsandbytes.nn.modules.Linear4bit", view_linear4bit)
