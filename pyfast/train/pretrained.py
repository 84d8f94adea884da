# SPDX-License-Identifier: Apache-2.0
"""Find and load a model with its tokenizer: the default one, a directory, or a name on the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import pyfast
from pyfast.errors import ConfigError, PyfastError
from pyfast.train.default_model import default_model_dir

_HUB_SECONDS = 5.0
_FIX = "Fix: the path of a model directory, or --model default."
# Constants that models once stored beside their weights, and now make themselves.
_CONSTANTS = (r"rotary_emb\.inv_freq$", r"\.masked_bias$")


def model_source(name: str) -> str:
    """What `from_pretrained` takes for a model name of the configuration."""
    return str(default_model_dir()) if name == "default" else name


def load_pretrained(
    source: str, dtype: torch.dtype, device: torch.device, nf4: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """A language model, decoder or encoder-decoder, and its tokenizer; code with a model is never run.

    Args:
        source: From `model_source`.
        dtype: Of its dense weights.
        device: Where it is put.
        nf4: What `pyfast.quantize` would be given: the layers become NF4 as they are read. A model that
            is stored quantised stays as it is, and has a `quantization_config`.

    Raises:
        ConfigError: There is no such model, here or on the hub, it cannot be read, or its weights are
            not those that its config.json asks for.
        NonFiniteError: Under nf4, a weight holds NaN or infinity.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    place = _locate(source)
    only = {"local_files_only": Path(place).is_dir()}
    with telling_what_cannot_be_read(source):
        config = AutoConfig.from_pretrained(place, **only)
        tokenizer = AutoTokenizer.from_pretrained(place, **only)
        options: dict[str, Any] = dict(only)
        if nf4 is not None and getattr(config, "quantization_config", None) is None:
            options["quantization_config"] = pyfast.NF4Config(**nf4)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(
            place,
            dtype=dtype,
            device_map={"": device},
            ignore_mismatched_sizes=True,  # they are told below, with both shapes
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if "quantization_config" in options:
        del model.config.quantization_config  # it is in no file, as after `pyfast.quantize`
    if other := sorted(info["mismatched_keys"]):
        name, stored, needed = other[0]
        raise ConfigError(
            f"{len(other)} weights of '{source}' have other shapes than its config.json asks for (first: "
            f"{name}, {list(stored)} for {list(needed)}). Fix: the config.json that belongs to the weights."
        )
    check_whole(source, model, info["missing_keys"], info["unexpected_keys"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@contextlib.contextmanager
def telling_what_cannot_be_read(source: str) -> Iterator[None]:
    """Turn whatever a model's files make transformers raise into one sentence."""
    try:
        yield
    except PyfastError:
        raise
    except Exception as error:  # the values of a config.json reach any arithmetic there is
        raise ConfigError(f"cannot load the model '{source}': {_first_line(error)}.") from error


def check_whole(source: str, model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a model that its config.json makes of other weights than the stored ones.

    Args:
        source: The model as the user named it.
        model: What its config.json describes.
        missing: Weights of `model` that are not stored.
        unexpected: Stored tensors that `model` has no place for.

    Raises:
        ConfigError: A weight is missing, or a part of `model` has fewer weights than are stored.
    """
    if lacking := sorted(missing):
        raise ConfigError(
            f"'{source}' lacks {len(lacking)} weights of {type(model).__name__} (first: {lacking[0]}). "
            "Fix: get the model again, as a whole."
        )
    if surplus := _surplus(model, unexpected):
        raise ConfigError(
            f"'{source}' holds {len(surplus)} weights more than its config.json asks for (first: "
            f"{surplus[0]}). Fix: the config.json that belongs to the weights."
        )


def _surplus(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Stored weights of parts that the model has, such as layers beyond its last one: it drops them.

    Parts that its class does not have at all, such as a value head, take no part in what it computes.
    """
    ignored = re.compile("|".join([*_CONSTANTS, *(model._keys_to_ignore_on_load_unexpected or ())]))
    base = model.base_model_prefix
    children = [*model.named_children(), *model.base_model.named_children()]
    parts = {name for name, _ in children if name != base}
    buffers = {name.removeprefix(f"{base}.") for name, _ in model.named_buffers()}
    # The files of a base model alone have its names without the prefix.
    names = {key: key.removeprefix(f"{base}.") for key in sorted(unexpected)}
    return [
        key
        for key, name in names.items()
        if name.partition(".")[0] in parts and name not in buffers and not ignored.search(key)
    ]


def _locate(source: str) -> str:
    """A model directory, in the hub's cache where the hub is out of reach, or a name that the hub has.

    from_pretrained alone tries again and again for half a minute before it says that a name is wrong.

    Raises:
        ConfigError: It is none of these.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return source
        is_adapter = (path / "adapter_config.json").is_file()
        fix = f"It is an adapter. Fix: --adapter {source}" if is_adapter else _FIX
        raise ConfigError(f"'{source}' is not a model directory: it has no config.json. {fix}")
    try:
        HfApi().model_info(source, timeout=_HUB_SECONDS)
        return source
    except HFValidationError as error:
        raise ConfigError(
            f"the model '{source}' is neither a directory here nor a name on the Hugging Face hub "
            f"(OWNER/NAME). {_FIX}"
        ) from error
    except Exception as error:  # out of reach: an error of whichever HTTP library is used
        if isinstance(cached := try_to_load_from_cache(source, "config.json"), str):
            return str(Path(cached).parent)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        where = (
            f"the Hugging Face hub has none of this name that is open to you (HTTP {status})"
            if status in (401, 403, 404)
            else f"the Hugging Face hub cannot be asked ({_first_line(error)})"
        )
        raise ConfigError(
            f"the model '{source}' is no directory here, and {where}. {_FIX}"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says first, with the line that a heading announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines or [type(error).__name__])[0]
    return " ".join(lines[:2] if first.endswith(":") else [first]).rstrip(".:")
