# SPDX-License-Identifier: Apache-2.0
"""Bridges to transformers, PEFT and bitsandbytes; none of them is imported before it is needed."""

from pyfast.integrations import bitsandbytes, registries, transformers
from pyfast.integrations.accelerate import Report, accelerate
from pyfast.integrations.peft import adapter_state_dict, save_adapter
from pyfast.integrations.transformers import load_adapter

__all__ = [
    "Report",
    "accelerate",
    "adapter_state_dict",
    "bitsandbytes",
    "load_adapter",
    "registries",
    "save_adapter",
    "transformers",
]
