# SPDX-License-Identifier: Apache-2.0
"""The commands that use what a fine-tuning run leaves behind."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

import pyfast
from pyfast.errors import AdapterMismatchError, ConfigError, UnsafeFileError
from pyfast.nn.nf4 import STATE_KEY, unpack_state
from pyfast.train.config import RunOptions
from pyfast.train.default_model import default_model_dir
from pyfast.train.metrics import say
from pyfast.train.model import choose_place, load_pretrained, model_source, stream_answer

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
        nf4: Quantise the base to NF4 first, as it was when a qlora adapter was trained.
        blocksize: Under nf4: weights that share one scale.
        nested: Under nf4: quantise the scales too.
        device: "auto" takes CUDA when there is one.
        dtype: "auto" takes bf16 where the processor computes in it.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError("max_new_tokens must be at least 1 and temperature not negative.")
    place = choose_place(RunOptions(device=device, dtype=dtype))
    network, tokenizer = load_pretrained(_base(model, adapter), place.dtype, place.device)
    if nf4:
        pyfast.quantize(network, blocksize=blocksize, nested=nested)
    if adapter is not None:
        pyfast.load_adapter(network, adapter)
    torch.manual_seed(seed)
    if prompt is not None:
        stream_answer(network, tokenizer, prompt, max_new_tokens, temperature)
        return
    if sys.stdin.isatty():
        say("One question a line; Ctrl-D ends.")
    for line in sys.stdin:
        if line.strip():
            stream_answer(network, tokenizer, line.strip(), max_new_tokens, temperature)


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
        nf4: Merge into the base's NF4-rounded weights, which a qlora adapter was trained on.
        blocksize: Under nf4: weights that share one scale.
        nested: Under nf4: quantise the scales too.
    """
    with _new_directory(output) as directory:
        network, tokenizer = load_pretrained(
            _base(model, adapter), torch.float32, torch.device("cpu")
        )
        if nf4:
            pyfast.quantize(network, blocksize=blocksize, nested=nested)
        pyfast.load_adapter(network, adapter)
        pyfast.merge(network, dtype=torch.float32)
        pyfast.unload(network)
        _save_dense(network, tokenizer, directory, _DTYPES[dtype])
    say(
        f"Merged {adapter} into {output} ({dtype}). Try: pyfast generate --model {output} --prompt '...'"
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
        network, tokenizer = load_pretrained(
            model_source(model), torch.bfloat16, torch.device("cpu")
        )
        if getattr(network.config, "quantization_config", None) is not None:
            raise ConfigError(
                f"'{model}' is quantised already. Fix: pyfast convert it to a dense one first."
            )
        before = sum(parameter.nbytes for parameter in network.parameters())
        pyfast.quantize(network, blocksize=blocksize, nested=nested)
        network.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        _mark_quantized(directory / "config.json", network, nested)
        after = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    say(
        f"{model}: {before / 1e6:,.1f} MB in bf16, {after / 1e6:,.1f} MB in NF4. Written to {output}."
    )


def _mark_quantized(config: Path, network: Any, nested: bool) -> None:
    """Add what tells transformers to load the weights through bitsandbytes."""
    values = json.loads(config.read_text(encoding="utf-8"))
    dense = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, pyfast.nn.NF4Linear)
    ]
    values["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def convert(
    source: str, output: str, dtype: DenseDtype = "bf16", trust_pickle: bool = False
) -> None:
    """Convert an adapter to safetensors, or a dense or bitsandbytes 4-bit model to dense weights.

    Args:
        source: Adapter directory, adapter_model.bin, or model directory.
        output: Directory to write; it must not exist.
        dtype: Type of a model's dense weights; an adapter keeps its own.
        trust_pickle: Open a .bin adapter. It is a Python pickle; only tensors are read from it.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"'{source}' does not exist.")
    adapter = (
        path
        if path.is_file()
        else next((path / f for f in _ADAPTER_FILES if (path / f).exists()), None)
    )
    with _new_directory(output) as directory:
        if adapter is not None:
            _convert_adapter(adapter, directory, trust_pickle)
        else:
            _convert_model(path, directory, _DTYPES[dtype])
    say(f"Converted {source} to {output}.")


def _convert_adapter(file: Path, directory: Path, trust_pickle: bool) -> None:
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    elif trust_pickle:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UnsafeFileError(
                f"'{file}' is damaged or holds more than tensors, so it was not converted "
                f"({type(error).__name__})."
            ) from error
        bad = not isinstance(tensors, dict) or not all(
            isinstance(v, torch.Tensor) for v in tensors.values()
        )
        if bad:
            raise AdapterMismatchError(f"'{file}' does not hold a dictionary of tensors.")
    else:
        raise UnsafeFileError(
            f"'{file}' is a Python pickle and can run code when read; pyfast does not open it. "
            "Fix: get a safetensors file, or for a file that you trust --trust_pickle true."
        )
    config = file.with_name("adapter_config.json")
    if not config.is_file():
        raise ConfigError(f"'{config}' is missing; without it the adapter cannot be used.")
    shutil.copyfile(config, directory / config.name)
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, directory / _ADAPTER_FILES[0], metadata={"format": "pt"})


def _convert_model(path: Path, directory: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"'{path}' holds neither an adapter nor a model: {reason}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        network, tokenizer = load_pretrained(str(path), dtype, torch.device("cpu"))
        _save_dense(network, tokenizer, directory, dtype)
        return
    if not quantization.get("load_in_4bit"):
        kind = quantization.get("quant_method")
        raise ConfigError(
            f"'{path}' is quantised by {kind}; only bitsandbytes' 4-bit form can be converted."
        )
    del config.quantization_config
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    network.load_state_dict(_dense_tensors(tensors, network, dtype), strict=False, assign=True)
    network.tie_weights()
    lacking = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if lacking:
        raise AdapterMismatchError(
            f"'{path}' lacks {len(lacking)} weights of {type(network).__name__} (first: {lacking[0]}). "
            "Nothing was written."
        )
    _save_dense(network, AutoTokenizer.from_pretrained(path), directory, dtype)


def _dense_tensors(
    tensors: dict[str, torch.Tensor], network: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A state dict with every NF4 weight dequantised."""
    dense = {}
    mark = f".weight.{STATE_KEY}"
    for layer in [name.removesuffix(mark) for name in tensors if name.endswith(mark)]:
        start = f"{layer}.weight."
        parts = {
            name.removeprefix(start): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(start)
        }
        weight = unpack_state(tensors.pop(f"{layer}.weight"), parts, module=layer).dense()
        # transformers' Conv1D keeps its weight as [in, out]; the 4-bit form is always [out, in].
        transposed = type(network.get_submodule(layer)).__name__ == "Conv1D"
        dense[f"{layer}.weight"] = weight.t().contiguous() if transposed else weight
    dense |= tensors
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in dense.items()
    }


def _save_dense(network: Any, tokenizer: Any, directory: Path, dtype: torch.dtype) -> None:
    network.to(dtype)
    network.config.dtype = dtype
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _base(model: str | None, adapter: str | None) -> str:
    """What to load as the base of an adapter."""
    if model is not None:
        return model_source(model)
    if adapter is None:
        return model_source("default")
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        raise ConfigError(
            f"'{adapter}' is not an adapter directory: it has no adapter_config.json."
        )
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"'{file}' cannot be read: {error}.") from error
    if not name:
        raise ConfigError(f"'{file}' does not name its base model. Fix: --model DIR.")
    # An adapter of the default model that was trained on another machine names that machine's cache.
    default = default_model_dir
    if not Path(name).exists() and Path(name).name.startswith("SmolLM2-135M-Instruct-"):
        return str(default())
    return str(name)


@contextlib.contextmanager
def _new_directory(output: str) -> Iterator[Path]:
    """A directory that appears under its name when it is complete, or not at all."""
    target = Path(output)
    if target.exists():
        raise ConfigError(f"output '{output}' exists already. Fix: another --output.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".tmp-{target.name}-"
        ) as temporary:
            inner = Path(temporary) / "out"
            inner.mkdir()
            yield inner
            inner.rename(target)
    except OSError as error:
        if isinstance(error, pyfast.PyfastError):
            raise
        raise ConfigError(f"output '{output}' cannot be written: {error}.") from error
