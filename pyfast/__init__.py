# SPDX-License-Identifier: Apache-2.0
"""pyfast: fine-tune transformer models at the speed of the frozen model."""

from importlib.metadata import PackageNotFoundError, version

from pyfast import errors, nn, ops
from pyfast.errors import PyfastError
from pyfast.integrations import (
    Report,
    accelerate,
    adapter_state_dict,
    load_adapter,
    save_adapter,
)
from pyfast.methods import (
    LoraConfig,
    SFTConfig,
    adapter_parameters,
    adapters_disabled,
    apply,
    delete_adapter,
    merge,
    quantize,
    set_adapter,
    unload,
    unmerge,
)

try:
    __version__ = version("pyfast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "LoraConfig",
    "PyfastError",
    "Report",
    "SFTConfig",
    "accelerate",
    "adapter_parameters",
    "adapter_state_dict",
    "adapters_disabled",
    "apply",
    "delete_adapter",
    "errors",
    "load_adapter",
    "merge",
    "nn",
    "ops",
    "quantize",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
]
