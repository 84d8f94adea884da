# SPDX-License-Identifier: Apache-2.0
"""pyfast: fine-tune transformer models at the speed of the frozen model."""

import sys as _sys
from importlib import metadata as _metadata
from pathlib import Path as _Path
from typing import Any as _Any

try:
    from pyfast import errors, nn, ops
    from pyfast.errors import PyfastError
    from pyfast.integrations import (
        Report,
        accelerate,
        adapter_state_dict,
        load_adapter,
        save_adapter,
    )
    from pyfast.integrations.registries import nf4_config as _nf4_config
    from pyfast.methods import (
        BottleneckConfig,
        IA3Config,
        LoraConfig,
        PromptEncoderConfig,
        SFTConfig,
        accumulate_in_kernels,
        adapter_parameters,
        adapters_disabled,
        adapters_per_sample,
        apply,
        delete_adapter,
        loraplus_groups,
        merge,
        quantize,
        requantize,
        set_adapter,
        unload,
        unmerge,
    )
except KeyboardInterrupt:
    # The command line imports this package, and so torch, ahead of `main`, which says this afterwards.
    _starting = _Path(_sys.argv[0]).stem == "pyfast" or (
        _sys.argv[0] == "-m" and "pyfast" in _sys.orig_argv
    )
    if not _starting or "--debug" in _sys.orig_argv:
        raise
    _sys.stderr.write("Interrupted.\n")
    raise SystemExit(130) from None

try:
    __version__ = _metadata.version("pyfast")
except _metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "BottleneckConfig",
    "IA3Config",
    "LoraConfig",
    "NF4Config",
    "PromptEncoderConfig",
    "PyfastError",
    "Report",
    "SFTConfig",
    "accelerate",
    "accumulate_in_kernels",
    "adapter_parameters",
    "adapter_state_dict",
    "adapters_disabled",
    "adapters_per_sample",
    "apply",
    "delete_adapter",
    "errors",
    "load_adapter",
    "loraplus_groups",
    "merge",
    "nn",
    "ops",
    "quantize",
    "requantize",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
]


def __getattr__(name: str) -> _Any:
    """`NF4Config`, which is not there without transformers."""
    if name == "NF4Config":
        return _nf4_config()
    raise AttributeError(f"module 'pyfast' has no attribute {name!r}")
