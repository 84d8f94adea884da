# SPDX-License-Identifier: Apache-2.0
"""Modules and weight formats; knows nothing of transformers, PEFT or bitsandbytes."""

from pyfast.nn.adapter_layer import AdapterLayer, SavedModule
from pyfast.nn.nf4 import NF4Linear
from pyfast.nn.weight import (
    DENSE_DTYPES,
    DenseWeight,
    NF4Weight,
    Weight,
    register_format,
    weight_of,
)

__all__ = [
    "DENSE_DTYPES",
    "AdapterLayer",
    "DenseWeight",
    "NF4Linear",
    "NF4Weight",
    "SavedModule",
    "Weight",
    "register_format",
    "weight_of",
]
