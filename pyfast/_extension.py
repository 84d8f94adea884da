# SPDX-License-Identifier: Apache-2.0
"""The one importer of the compiled extension `pyfast._C`.

`C` is the module, or None with `reason` saying why. Kernels take raw pointers: `ptr`, `device_index` and
`stream` turn a tensor into what they expect.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

C: Any
reason = ""
try:
    from pyfast import _C as _module

    C = _module
except ImportError as error:
    C = None
    reason = (
        f"the compiled extension pyfast._C could not be imported ({error}); "
        "build it with `pip install .` in the source tree"
    )

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Codes of the element types that kernels take (csrc/common/dtype.h)."""


def module() -> ModuleType:
    """The extension, or an ImportError that says how to build it."""
    if C is None:
        raise ImportError(reason)
    return C  # type: ignore[no-any-return]


def has_cuda() -> bool:
    """Whether the extension was built with CUDA kernels."""
    return C is not None and C.build_info()["cuda"] is not None


def missing_cuda() -> str:
    """Why there are no CUDA kernels; empty where there are."""
    if C is None:
        return reason
    return "" if has_cuda() else "this build has no CUDA kernels"


def ptr(tensor: torch.Tensor | None) -> int:
    """Address of the tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: int) -> int:
    """Handle of a CUDA device's current stream."""
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


def launch_args(tensor: torch.Tensor) -> dict[str, int]:
    """`device`, `threads` and `stream` for a launch on the tensor's device."""
    if tensor.device.type == "cuda":
        index = tensor.device.index
        return {
            "device": index,
            "threads": 1,
            "stream": stream(index),
        }
    return {"device": -1, "threads": torch.get_num_threads(), "stream": 0}
