# SPDX-License-Identifier: Apache-2.0
"""Model files of any stored form, dense or 4-bit, read as a dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pyfast.errors import ConfigError
from pyfast.integrations.bitsandbytes import METHOD
from pyfast.nn.nf4 import STATE_KEY, unpack_state
from pyfast.train.command import program
from pyfast.train.pretrained import check_whole, load_pretrained, telling_what_cannot_be_read


def is_quantized(source: str) -> bool:
    """Whether a model directory holds quantised weights."""
    return _quantization(source) is not None


def _quantization(source: str) -> dict[str, Any] | None:
    file = Path(source) / "config.json"
    if not file.is_file():  # a name on the hub, or an error that loading tells
        return None
    try:
        return (
            dict(json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {})
            or None
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"'{file}' cannot be read: {error}.") from error


def load_dense(
    source: str, dtype: torch.dtype, nf4: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """A model with dense weights, and its tokenizer; 4-bit weights of a directory are dequantised.

    Args:
        source: From `model_source`.
        dtype: Of its dense weights.
        nf4: What `pyfast.quantize` would be given: a dense model's layers become NF4 as they are read.

    Raises:
        ConfigError: There is no such model, it is quantised in another form, or its weights are not
            those that its config.json asks for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quantization = _quantization(source)
    if quantization is None:
        network, tokenizer = load_pretrained(source, dtype, torch.device("cpu"), nf4)
        if getattr(network.config, "quantization_config", None) is not None:
            raise ConfigError(
                f"'{source}' is quantised, and only a directory can be made dense. "
                f"Fix: download it, and {program()} convert --source DIR --output DENSE"
            )
        return network, tokenizer
    if quantization.get("quant_method") == METHOD:
        network, tokenizer = load_pretrained(source, dtype, torch.device("cpu"))
        return network.dequantize(dtype), tokenizer
    if not quantization.get("load_in_4bit"):
        kind = quantization.get("quant_method")
        raise ConfigError(
            f"'{source}' is quantised by {kind}; only bitsandbytes' 4-bit form can be made dense."
        )
    with telling_what_cannot_be_read(source):
        config = AutoConfig.from_pretrained(source)
        del config.quantization_config
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(Path(source).glob("*.safetensors")):
            tensors |= read_tensors(file)
        loaded = network.load_state_dict(
            _dense_tensors(tensors, network, dtype), strict=False, assign=True
        )
        network.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(source)
    lacking = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    check_whole(source, network, lacking, loaded.unexpected_keys)
    return network, tokenizer


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"'{file}' is damaged ({error}). Fix: get it again.") from error


def _dense_tensors(
    tensors: dict[str, torch.Tensor], network: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A state dict with every NF4 weight dequantised."""
    dense = {}
    modules = dict(network.named_modules())
    mark = f".weight.{STATE_KEY}"
    for layer in [name.removesuffix(mark) for name in tensors if name.endswith(mark)]:
        start = f"{layer}.weight."
        parts = {
            name.removeprefix(start): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(start)
        }
        packed, shape = unpack_state(tensors.pop(f"{layer}.weight"), parts, module=layer)
        weight = packed.dense().view(shape)
        # transformers' Conv1D keeps its weight as [in, out]; the 4-bit form is always [out, in].
        transposed = type(modules.get(layer)).__name__ == "Conv1D"
        dense[f"{layer}.weight"] = weight.t().contiguous() if transposed else weight
    dense |= tensors
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in dense.items()
    }
