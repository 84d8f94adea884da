# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine and the code that a row of results names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import pyfast

ROOT = Path(__file__).resolve().parent.parent
TREES_VARIABLE = "PYFAST_TREES"
_IGNORED = ("__pycache__",)
_IGNORED_SUFFIXES = (".so", ".pyc", ".pyo", ".pyd")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def driver_version(device: torch.device) -> str | None:
    """The NVIDIA driver's version; None on CPU or where nvidia-smi is missing."""
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 else None


PEERS = ("peft", "unsloth", "liger-kernel", "bitsandbytes", "transformers")


def versions() -> dict[str, str | None]:
    """Version of torch, of pyfast and of the peers' packages; None of those that are not installed."""
    found: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("pyfast", *PEERS):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def tree_hash(directory: Path) -> str:
    """The object name that git would give to a directory's sources as they lie there.

    Computed here and not asked of git, so that uncommitted changes show and no repository is needed.
    Compiled files and caches are left out, as .gitignore does.
    """

    def git_object(kind: str, content: bytes) -> bytes:
        return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()

    def tree(path: Path) -> bytes:
        entries: list[tuple[str, bytes]] = []
        for child in path.iterdir():
            if child.name in _IGNORED or child.suffix in _IGNORED_SUFFIXES:
                continue
            if child.is_dir():
                if any(child.iterdir()) and (digest := tree(child)):
                    entries.append(
                        (f"{child.name}/", b"40000 " + child.name.encode() + b"\0" + digest)
                    )
            else:
                digest = git_object("blob", child.read_bytes())
                entries.append((child.name, b"100644 " + child.name.encode() + b"\0" + digest))
        return (
            git_object("tree", b"".join(entry for _, entry in sorted(entries))) if entries else b""
        )

    return tree(directory).hex()


def trees() -> dict[str, str | None]:
    """Tree hashes of csrc/ and of the imported pyfast/.

    `PYFAST_TREES="csrc=HASH,pyfast=HASH"` overrides them where the sources are not at hand.
    """
    given = os.environ.get(TREES_VARIABLE)
    if given:
        return {
            name: value for name, _, value in (item.partition("=") for item in given.split(","))
        }
    csrc = ROOT / "csrc"
    return {
        "csrc": tree_hash(csrc) if csrc.is_dir() else None,
        "pyfast": tree_hash(Path(pyfast.__file__).parent),
    }
