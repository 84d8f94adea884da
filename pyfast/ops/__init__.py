# SPDX-License-Identifier: Apache-2.0
"""Functional ops: each has a schema, checks, a fake, a torch reference and autograd, and may have kernels."""

from pyfast.ops import _flops  # noqa: F401
from pyfast.ops._library import OPS, recorded_kernels
from pyfast.ops.adapter import adapter_bottleneck, adapter_scale
from pyfast.ops.dora import dora_linear, dora_norms
from pyfast.ops.dropout import dropout
from pyfast.ops.lora import lora_linear
from pyfast.ops.nf4 import NestedScales, nf4_dequantize, nf4_nest, nf4_quantize
from pyfast.ops.nf4_linear import nf4_linear
from pyfast.ops.scaled_linear import scaled_linear

__all__ = [
    "OPS",
    "NestedScales",
    "adapter_bottleneck",
    "adapter_scale",
    "dora_linear",
    "dora_norms",
    "dropout",
    "lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_nest",
    "nf4_quantize",
    "recorded_kernels",
    "scaled_linear",
]
