# SPDX-License-Identifier: Apache-2.0
"""Modules and weight formats; knows nothing of transformers, PEFT or bitsandbytes."""

from pyfast.nn.adapter_layer import AdapterLayer, register_dense
from pyfast.nn.group import disband_groups
from pyfast.nn.nf4 import NF4Linear, NF4Tensor
from pyfast.nn.switchable import Attachment, Mergeable, SavedModule, Switchable
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
    "Attachment",
    "DenseWeight",
    "Mergeable",
    "NF4Linear",
    "NF4Tensor",
    "NF4Weight",
    "SavedModule",
    "Switchable",
    "Weight",
    "disband_groups",
    "register_dense",
    "register_format",
    "weight_of",
]
