# SPDX-License-Identifier: Apache-2.0
"""pyfast: fine-tune transformer models at the speed of the frozen model."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
    from pyfast.integrations.registries import nf4_config
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
    starting = Path(sys.argv[0]).stem == "pyfast" or (
        sys.argv[0] == "-m" and "pyfast" in sys.orig_argv
    )
    if not starting or "--debug" in sys.orig_argv:
        raise
    sys.stderr.write("Interrupted.\n")
    raise SystemExit(130) from None

try:
    __version__ = version("pyfast")
except PackageNotFoundError:  # a source tree that was never installed
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


def __getattr__(name: str) -> Any:
    """`NF4Config`, which is not there without transformers."""
    if name == "NF4Config":
        return nf4_config()
    raise AttributeError(f"module 'pyfast' has no attribute {name!r}")
