# SPDX-License-Identifier: Apache-2.0
"""`pyfast info`: what was built, what is here, what is supported, which kernel serves which op."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from pyfast import __version__, _extension
from pyfast.cli.matrix import cells, table
from pyfast.ops import OPS
from pyfast.ops._serving import serving
from pyfast.train.config import RunOptions
from pyfast.train.default_data import PACKAGE as DATA_PACKAGE
from pyfast.train.default_model import PACKAGE as MODEL_PACKAGE
from pyfast.train.metrics import say
from pyfast.train.model import choose_place

_LIBRARIES = ("transformers", "peft", "bitsandbytes", "trl", "accelerate", "datasets", "gguf")


def info(matrix: bool = False) -> None:
    """Show build, devices, libraries, the support matrix and the kernel that serves each op.

    Args:
        matrix: Show the table of families and methods alone.
    """
    if matrix:
        say(table())
        return
    for title, rows in (
        ("Build", _build()),
        ("Devices", _devices()),
        (
            "Libraries",
            [(name, _version(name)) for name in (*_LIBRARIES, MODEL_PACKAGE, DATA_PACKAGE)],
        ),
        ("Support", _support()),
        ("Kernels", _kernels()),
    ):
        say(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            say(f"  {name:<{width}}  {value}".rstrip())
        say()


def _build() -> list[tuple[str, str]]:
    rows = [
        ("pyfast", __version__),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
    ]
    if _extension.C is None:
        return [*rows, ("extension", f"missing: {_extension.reason}")]
    build = _extension.C.build_info()
    cuda = (
        f"{build['cuda']} for {', '.join(build['cuda_architectures'])}"
        if build["cuda"]
        else "not built"
    )
    return [
        *rows,
        ("compiler", f"{build['compiler']}, {build['build_type']}"),
        ("CUDA kernels", cuda),
        ("CPU kernels", ", ".join(build["cpu_isas"])),
        ("CUTLASS", build["cutlass"] or "not built"),
    ]


def _devices() -> list[tuple[str, str]]:
    cpu = (
        str(torch.cpu.get_capabilities().get("cpu_name", ""))
        or platform.processor()
        or platform.machine()
    )
    rows = [("cpu", f"{cpu}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = gpu.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {size:.0f} GiB"))
    return [*rows, ("training on", str(choose_place(RunOptions())))]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _support() -> list[tuple[str, str]]:
    """Family and its methods."""
    served: dict[str, list[str]] = {}
    for family, method in cells():
        served.setdefault(family, []).append(method)
    return [(family, ", ".join(methods)) for family, methods in served.items()]


def _kernels() -> list[tuple[str, str]]:
    """Per op and kind of device what serves it; a backward op only where something else does."""
    rows = []
    for op in OPS:
        for device in ("cpu", "cuda"):
            lines = serving(op, device)
            forward = op.removesuffix("_backward")
            if forward != op and forward in OPS and lines == serving(forward, device):
                continue
            rows += [(f"{op} on {device}", lines[0]), *(("", line) for line in lines[1:])]
    return rows
