# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning methods: one file each, found by the type of their config."""

from pyfast.methods.accumulate import accumulate_in_kernels
from pyfast.methods.apply import apply, coerce_config
from pyfast.methods.base import METHODS, Method
from pyfast.methods.bottleneck import BottleneckConfig
from pyfast.methods.ia3 import IA3Config
from pyfast.methods.lora import LoraConfig
from pyfast.methods.loraplus import loraplus_groups
from pyfast.methods.p_tuning import PromptEncoderConfig
from pyfast.methods.per_sample import adapters_per_sample
from pyfast.methods.quantize import quantize
from pyfast.methods.requantize import requantize
from pyfast.methods.sft import SFTConfig
from pyfast.methods.state import (
    adapter_parameters,
    adapters_disabled,
    delete_adapter,
    merge,
    set_adapter,
    unload,
    unmerge,
)

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "IA3Config",
    "LoraConfig",
    "Method",
    "PromptEncoderConfig",
    "SFTConfig",
    "accumulate_in_kernels",
    "adapter_parameters",
    "adapters_disabled",
    "adapters_per_sample",
    "apply",
    "coerce_config",
    "delete_adapter",
    "loraplus_groups",
    "merge",
    "quantize",
    "requantize",
    "set_adapter",
    "unload",
    "unmerge",
]
