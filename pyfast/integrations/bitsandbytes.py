# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' `Linear4bit` as a weight format: its bytes are read in place, never re-quantised; and how a
saved model says that transformers is to load it through bitsandbytes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pyfast.nn import DENSE_DTYPES, NF4Linear, NF4Tensor, NF4Weight, register_format
from pyfast.nn.nf4 import check_weight, require, same_values
from pyfast.nn.weight import forward_replaced
from pyfast.ops._check import NEST_BLOCK
from pyfast.ops._nf4_format import NEST_MAP, NF4_CODE

METHOD = "pyfast_nf4"
"""Our quantizer's name in transformers' registry and in config.json."""

_HELD = ("", "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


def view_linear4bit(module: nn.Module) -> NF4Weight | None:
    """The NF4 weight of a quantised `Linear4bit`; None where `unsupported_reason` says why."""
    if unsupported_reason(module):
        return None
    weight: Any = module.weight
    state = _quant_state(weight)
    return NF4Weight(
        packed=weight.data.view(-1).view(torch.uint8).view(-1, 1),
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
    if forward_replaced(module):
        return "its forward was replaced, as hooks that move weights between devices do"
    state: Any = _quant_state(module.weight)
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


def check_linear4bit(path: str, module: nn.Module) -> None:
    """Raise QuantStateError for a `Linear4bit` whose quantisation state is damaged: bitsandbytes itself reads
    past the end of what such a state holds."""
    if unsupported_reason(module):
        return
    state: Any = _quant_state(module.weight)
    shape = (module.out_features, module.in_features)
    require(tuple(state.shape) == shape, path, f"quant_state has shape {state.shape}, not {shape}")
    require(state.dtype in DENSE_DTYPES, path, f"quant_state has dtype {state.dtype}")
    tables = [(state.code, NF4_CODE)]
    tensors = [state.absmax]
    if state.nested:
        tables.append((state.state2.code, NEST_MAP))
        tensors += [state.state2.absmax, state.offset]
    for tensor in (*tensors, *(table for table, _ in tables if table is not None)):
        require(isinstance(tensor, torch.Tensor), path, f"quant_state holds a {type(tensor)}")
    for table, expected in tables:
        require(table is None or same_values(table, expected), path, "a code table is not NF4's")
    check_weight(view_linear4bit(module), path)  # type: ignore[arg-type]


def _quant_state(weight: Any) -> Any:
    """The quantisation state of a `Params4bit`; releases before 0.41.3 had a list in its place."""
    state = getattr(weight, "quant_state", None)
    if not isinstance(state, list):
        return state
    absmax, shape, dtype, blocksize, nested, quant_type, *code = state
    offset, state2 = nested or (None, None)
    if isinstance(state2, list):
        state2 = SimpleNamespace(absmax=state2[0], code=state2[1], blocksize=state2[2])
    return SimpleNamespace(
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=blocksize,
        nested=state2 is not None,
        offset=offset,
        state2=state2,
        quant_type=quant_type,
        code=code[0] if code else None,
    )


def quantization_config(model: Any) -> Any:
    """The `quantization_config` that belongs to a transformers model as it is now: which of its linear layers
    are in 4 bits, ours or bitsandbytes'; None where none is. That of another quantiser stays as it is.

    It names bitsandbytes wherever bitsandbytes can read the model, and else our own quantizer.
    """
    given: Any = getattr(model.config, "quantization_config", None)
    values: Any = given.to_dict() if hasattr(given, "to_dict") else given
    if values and values.get("quant_method") == METHOD:
        values = values.get("bitsandbytes")
    elif values and not values.get("load_in_4bit"):
        return given
    four_bit, dense = _linears(model)
    ours = [layer for layer in four_bit if isinstance(layer, NF4Tensor)]
    if not four_bit:
        return None
    nested = any(layer.nested_absmax is not None for layer in ours)
    if not all(_readable(layer) for layer in ours):
        facts = {"quant_method": METHOD, "blocksize": ours[0].blocksize, "nested": nested}
        return facts | ({"bitsandbytes": values} if values else {})
    if not values:
        values = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": str(ours[0].original_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": str(ours[0].quant_storage).removeprefix("torch."),
        }
    return values | {"llm_int8_skip_modules": dense}


def _readable(layer: NF4Tensor) -> bool:
    """Whether transformers makes a `Linear4bit` of the layer in whose place this one is."""
    return isinstance(layer, NF4Linear) and layer.replaced in _HELD


def _linears(model: nn.Module) -> tuple[list[nn.Module], list[str]]:
    """The 4-bit layers, and the paths of those that transformers would otherwise take for such."""
    bnb: Any = sys.modules.get("bitsandbytes.nn.modules")
    library: Any = sys.modules["transformers.pytorch_utils"]
    four_bit, dense = [], []
    for path, module in model.named_modules():
        if isinstance(module, NF4Tensor) or (bnb and isinstance(module, bnb.Linear4bit)):
            four_bit.append(module)
        elif isinstance(module, (nn.Linear, library.Conv1D)):
            dense.append(path)
    return four_bit, dense


register_format("bitsandbytes.nn.modules.Linear4bit", view_linear4bit)
