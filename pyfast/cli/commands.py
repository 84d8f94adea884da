# SPDX-License-Identifier: Apache-2.0
"""The commands that use what a fine-tuning run leaves behind."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import pyfast
from pyfast.cli.adapters import adapter_config, check_merges
from pyfast.cli.dense import is_quantized, load_dense, read_tensors
from pyfast.cli.nemo import write_as_nemo, write_as_peft
from pyfast.errors import AdapterMismatchError, ConfigError, NonFiniteError, UnsafeFileError
from pyfast.integrations.base_weights import NF4Settings, OtherBaseWarning
from pyfast.integrations.nemo_file import is_nemo, read_archive, read_nemo
from pyfast.integrations.nemo_lora import NemoLora
from pyfast.methods.base import adapted_modules
from pyfast.nn import NF4Tensor
from pyfast.train.checkpoint import honour_umask
from pyfast.train.command import program
from pyfast.train.config import RunOptions
from pyfast.train.default_model import HUB_ID, default_model_dir, has_default_model
from pyfast.train.metrics import say
from pyfast.train.model import choose_place, save_tokenizer, stream_answer
from pyfast.train.pretrained import load_pretrained, model_source

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

DenseDtype = Literal["bf16", "fp16", "fp32"]


def generate(
    model: str | None = None,
    adapter: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    nf4: bool = False,
    blocksize: int = 64,
    nested: bool = True,
    device: str = "auto",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
) -> None:
    """Answer a prompt, or each line of standard input.

    Args:
        model: Model directory or name; by default the adapter's base, else the default model.
        adapter: Adapter directory in PEFT's format.
        prompt: The question; without it, one is read from each line of standard input.
        max_new_tokens: Length at which an answer is cut.
        temperature: 0 takes the likeliest token each time, else tokens are drawn.
        seed: Decides what is drawn.
        nf4: Quantise the base to NF4 first, as it was when a qlora adapter was trained; a base that
            is stored in 4 bits stays as it is.
        blocksize: Under nf4: weights that share one scale.
        nested: Under nf4: quantise the scales too.
        device: "auto" takes CUDA when there is one.
        dtype: "auto" takes bf16 where the processor computes in it.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError("max_new_tokens must be at least 1 and temperature not negative.")
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty. Fix: --prompt 'a question'.")
    place = choose_place(RunOptions(device=device, dtype=dtype))
    quant = {"blocksize": blocksize, "nested": nested} if nf4 else None
    network, tokenizer = load_pretrained(_base(model, adapter), place.dtype, place.device, quant)
    if adapter is not None:
        _load_adapter(network, adapter)
    torch.manual_seed(seed)
    if prompt is not None:
        stream_answer(network, tokenizer, prompt, max_new_tokens, temperature)
        return
    if sys.stdin.isatty():
        say("One question a line; Ctrl-D ends.")
    for question in _questions():
        stream_answer(network, tokenizer, question, max_new_tokens, temperature)


def _questions() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    try:
        for line in sys.stdin:
            line.encode("utf-8")  # in some locales a bad byte shows here only
            if line.strip():
                yield line.strip()
    except UnicodeError as error:
        raise ConfigError(
            f"standard input is not UTF-8: {error}. Fix: questions in UTF-8."
        ) from error


def merge(
    adapter: str,
    output: str,
    model: str | None = None,
    dtype: DenseDtype = "bf16",
    nf4: bool = False,
    blocksize: int = 64,
    nested: bool = True,
) -> None:
    """Merge an adapter into a dense model that transformers loads.

    Args:
        adapter: Adapter directory in PEFT's format.
        output: Directory to write; it must not exist.
        model: Base model; by default the one that the adapter names.
        dtype: Type of the merged weights. The sum is made in fp32 and rounded once.
        nf4: Merge into the base's NF4-rounded weights, which a qlora adapter was trained on; those of
            a base that is stored in 4 bits are rounded already.
        blocksize: Under nf4: weights that share one scale.
        nested: Under nf4: quantise the scales too.
    """
    with _new_directory(output) as directory:
        base = _base(model, adapter)
        check_merges(adapter)
        rounded = is_quantized(base)
        quant = {"blocksize": blocksize, "nested": nested} if nf4 and not rounded else None
        network, tokenizer = load_dense(base, torch.float32, quant)
        _load_adapter(network, adapter, rounded)
        _round_others(network, _DTYPES[dtype])
        pyfast.merge(network, dtype=_DTYPES[dtype])
        pyfast.unload(network)
        _save_dense(network, tokenizer, directory, _DTYPES[dtype])
    say(
        f"Merged {adapter} into {output} ({dtype}). "
        f"Try: {program()} generate --model {shlex.quote(output)} --prompt '...'"
    )


def quantize(model: str, output: str, blocksize: int = 64, nested: bool = True) -> None:
    """Write a model with NF4 weights in bitsandbytes' format.

    Args:
        model: Model directory or name, or "default".
        output: Directory to write; it must not exist.
        blocksize: Weights that share one scale.
        nested: Quantise the scales too.
    """
    with _new_directory(output) as directory:
        quant = {"blocksize": blocksize, "nested": nested}
        network, tokenizer = load_pretrained(
            model_source(model), torch.bfloat16, torch.device("cpu"), quant
        )
        if getattr(network.config, "quantization_config", None) is not None:
            raise ConfigError(
                f"'{model}' is quantised already. Fix: make it dense first: {program()} convert --source "
                f"{shlex.quote(model)} --output DENSE"
            )
        packed = [module for module in network.modules() if isinstance(module, NF4Tensor)]
        count = sum(math.prod(module.shape) - module.weight.numel() for module in packed)
        count += sum(parameter.numel() for parameter in network.parameters())
        network.save_pretrained(directory)
        save_tokenizer(tokenizer, directory)
        after = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    say(
        f"{model}: {2 * count / 1e6:,.1f} MB in bf16, {after / 1e6:,.1f} MB in NF4. Written to {output}."
    )


def convert(
    source: str,
    output: str,
    dtype: DenseDtype = "bf16",
    trust_pickle: bool = False,
    form: Literal["peft", "nemo", "nemo_canonical", "nemo1", "nemo1_canonical"] = "peft",
    model: str | None = None,
    stack: bool = False,
) -> None:
    """Convert an adapter to safetensors, to or from NeMo's form, or a dense or 4-bit model to dense weights.

    Args:
        source: Adapter directory, adapter_model.bin, LoRA adapter of NeMo's (.nemo, or what this command
            wrote), or model directory; ChatGLM 2 and 3 in their original layout become the GLM that
            transformers has.
        output: Directory to write; it must not exist.
        dtype: Type of a model's dense weights; an adapter keeps its own.
        trust_pickle: Open a .bin or .nemo adapter. It is a Python pickle; only tensors are read from it.
        form: Whose form an adapter gets: PEFT's, or NeMo's (nemo1: release 1) with one A for fused linears
            or, canonical, with one for each of their parts.
        model: To and from NeMo's form: base model; by default the one that an adapter names.
        stack: To and from NeMo's form: where a fused linear's parts have different A's, put them one below
            the other, which multiplies the rank.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"'{source}' does not exist.")
    if path.is_file() and path.suffix not in (".safetensors", ".bin", ".nemo"):
        raise ConfigError(
            f"'{source}' is neither a directory nor an adapter file (.safetensors, .bin, .nemo)."
        )
    nemo = is_nemo(path)
    adapter = (
        path
        if path.is_file()
        else next((path / f for f in _ADAPTER_FILES if (path / f).exists()), None)
    )
    if form != "peft" and (nemo or adapter is None):
        raise ConfigError(
            f"--form {form} is for an adapter in PEFT's form, which '{source}' is not."
        )
    if nemo and model is None:
        raise ConfigError(f"'{source}' does not name its base model. Fix: --model DIR")
    with _new_directory(output) as directory:
        if nemo:
            made = _nemo_adapter(path, trust_pickle)
            write_as_peft(made, directory, model_source(str(model)), stack)
        elif adapter is not None:
            _convert_adapter(adapter, directory, trust_pickle, form, model, stack)
        else:
            network, tokenizer = load_dense(source, _DTYPES[dtype])
            _save_dense(network, tokenizer, directory, _DTYPES[dtype])
    say(f"Converted {source} to {output}.")


def _convert_adapter(
    file: Path, directory: Path, trust_pickle: bool, form: str, model: str | None, stack: bool
) -> None:
    pickled = file.suffix != ".safetensors"
    tensors = _unpickled(file, file, trust_pickle) if pickled else read_tensors(file)
    config = file.with_name("adapter_config.json")
    if not config.is_file():
        raise ConfigError(f"'{config}' is missing; without it the adapter cannot be used.")
    if form != "peft":
        base = _base(model, str(config.parent))
        variant = "canonical" if form.endswith("canonical") else "nemo"
        release = 1 if form.startswith("nemo1") else 2
        write_as_nemo(config, tensors, directory, base, variant, release, stack)
        return
    shutil.copyfile(config, directory / config.name)
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, directory / _ADAPTER_FILES[0], metadata={"format": "pt"})


def _nemo_adapter(path: Path, trust_pickle: bool) -> NemoLora:
    if path.suffix != ".nemo":
        return read_nemo(path)
    return read_archive(path, lambda weights: _unpickled(weights, path, trust_pickle))


def _unpickled(
    file: Path | io.BytesIO, source: Path, trust_pickle: bool
) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, if the user trusts it."""
    if not trust_pickle:
        raise UnsafeFileError(
            f"'{source}' is a Python pickle and can run code when read; pyfast does not open it. "
            "Fix: get a safetensors file, or for a file that you trust --trust_pickle true."
        )
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UnsafeFileError(
            f"'{source}' is damaged or holds more than tensors, so it was not converted "
            f"({type(error).__name__})."
        ) from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise AdapterMismatchError(f"'{source}' does not hold a dictionary of tensors.")
    return tensors


def _save_dense(network: Any, tokenizer: Any, directory: Path, dtype: torch.dtype) -> None:
    network.to(dtype)
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            fix = "--dtype bf16" if dtype == torch.float16 else "finite weights to start from"
            raise NonFiniteError(
                f"{name} holds NaN or infinity in {dtype}, which ends at {torch.finfo(dtype).max:.4g}. "
                f"Nothing was written. Fix: {fix}."
            )
    network.config.dtype = dtype
    network.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def _round_others(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Bring what no adapter is merged into to its last dtype, so that NF4 layers can become dense in it, and
    not in float32 first."""
    merging = {p for module in adapted_modules(network).values() for p in module.parameters()}
    for parameter in network.parameters():
        if parameter.is_floating_point() and parameter not in merging:
            parameter.data = parameter.data.to(dtype)


def _load_adapter(network: torch.nn.Module, adapter: str, rounded: bool = False) -> None:
    """Load an adapter; `rounded` says that dense weights hold NF4 values, as they did in its training."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyfast.load_adapter(network, adapter)
    for text in [warning.message for warning in caught]:
        if not isinstance(text, OtherBaseWarning):
            sys.stderr.write(f"Note: {text}\n")
        elif not rounded:
            sys.stderr.write(f"Note: {text.finding}. Fix: {_flags(text.trained)}\n")


def _flags(trained: tuple[NF4Settings, ...] | None) -> str:
    """How to have the base as it was when an adapter was trained."""
    if trained == ():
        return "a dense --model without --nf4"
    if trained is None or len(trained) > 1:
        return "--nf4 true"
    (settings,) = trained
    nested = str(settings.nested).lower()
    return f"--nf4 true --blocksize {settings.blocksize} --nested {nested}, on a dense base"


def _base(model: str | None, adapter: str | None) -> str:
    """What to load as the base of an adapter."""
    if model is not None:
        return model_source(model)
    if adapter is None:
        return model_source("default")
    name = adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"'{adapter}' does not name its base model. Fix: --model DIR")
    if name == HUB_ID and has_default_model():
        sys.stderr.write(f"Base: the default model (--model {HUB_ID} takes the hub's).\n")
        return str(default_model_dir())
    return str(name)


@contextlib.contextmanager
def _new_directory(output: str) -> Iterator[Path]:
    """A directory that appears under its name when it is complete, or not at all."""
    target = Path(output)
    if target.exists():
        raise ConfigError(f"output '{output}' exists already. Fix: another --output.")
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".tmp-{target.name}-"
        ) as temporary:
            inner = Path(temporary) / "out"
            inner.mkdir()
            yield inner
            honour_umask(inner)
            inner.rename(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, pyfast.PyfastError):
            raise
        raise ConfigError(f"output '{output}' cannot be written: {error}.") from error
    finally:
        for parent in made if not target.exists() else ():
            with contextlib.suppress(OSError):
                parent.rmdir()
