# SPDX-License-Identifier: Apache-2.0
"""Layers over the NF4 bytes that all providers get: bitsandbytes' and ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import BLOCKSIZE
from benchmarks.operands import Operands
from pyfast.nn import NF4Linear, NF4Weight


def quant_state(operands: Operands) -> Any:
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


def linear_4bit(operands: Operands) -> nn.Module:
    """`Linear4bit` over the operands' NF4 bytes."""
    import bitsandbytes as bnb

    n, k = operands.w.shape
    nested = operands.nest is not None
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=operands.dtype, compress_statistics=nested,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.quant_state = quant_state(operands)
    layer.weight = bnb.nn.Params4bit(
        # Cloned: on CPU, bitsandbytes repacks the bytes of a layer that only runs forward.
        operands.packed.clone(), requires_grad=False, quant_state=layer.quant_state,
        blocksize=BLOCKSIZE, compress_statistics=nested, quant_type="nf4", module=layer,
        bnb_quantized=True,
    )  # fmt: skip
    return layer


def our_linear(operands: Operands) -> nn.Module:
    """pyfast's layer over the operands' NF4 bytes."""
    n, k = operands.w.shape
    scales = operands.scales
    weight = NF4Weight(
        operands.packed, scales["absmax"], (n, k), operands.dtype, BLOCKSIZE,
        scales.get("nested_absmax"), scales.get("nested_offset"),
    )  # fmt: skip
    return NF4Linear(weight)
