# SPDX-License-Identifier: Apache-2.0
"""Choose where and in what a model computes, put the method on it, ask it, write it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pyfast
from pyfast.errors import ConfigError, NoGradientError
from pyfast.nn.prompt import VirtualTokens, position_rows
from pyfast.train.checkpoint import honour_umask
from pyfast.train.config import FinetuneConfig, RunOptions, in_full
from pyfast.train.data import Data
from pyfast.train.default_model import HUB_ID
from pyfast.train.pretrained import load_pretrained, model_source


@dataclass(frozen=True)
class Place:
    """Device and dtype of a run, and the reason for the dtype."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        name = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{self.device} in {name} ({self.reason})"


def choose_place(options: RunOptions) -> Place:
    """Device and dtype: CUDA when there is one; bf16 where the processor has instructions for it.

    Raises:
        ConfigError: The device asked for does not exist.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" exists, but nothing can be read from it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"run.device is {name!r}: {reason}. Fix: --run.device auto") from error
    if options.dtype != "auto":
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        return Place(device, dtype, "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return Place(device, torch.bfloat16, "the GPU computes in it")
        return Place(device, torch.float32, "the GPU has no bf16")
    found = [isa for isa in ("amx_bf16", "avx512_bf16") if isa in _cpu_flags()]
    if found:
        return Place(device, torch.bfloat16, f"the CPU has {found[0]}")
    return Place(device, torch.float32, "the CPU has neither amx_bf16 nor avx512_bf16")


def _cpu_flags() -> set[str]:
    return {name for name, present in torch.cpu.get_capabilities().items() if present is True}


def prepare_model(
    config: FinetuneConfig, place: Place, weights: Path | None = None
) -> tuple[Any, Any]:
    """The model of a run with its method applied, and the tokenizer.

    Args:
        config: The run.
        place: From `choose_place`.
        weights: A model directory to read instead of the configured one (a checkpoint's, under sft).
    """
    # Full fine-tuning keeps fp32 weights and computes in bf16: in bf16 most updates would round away.
    dtype = torch.float32 if config.method == "sft" else place.dtype
    source = str(weights) if weights else model_source(config.model)
    nf4 = asdict(config.quant) if config.method == "qlora" else None
    model, tokenizer = load_pretrained(source, dtype, place.device, nf4)
    _check_prompt(config, model)
    pyfast.apply(model, method_config(config, model.config.is_encoder_decoder))
    if config.run.activation_checkpointing:
        # The reentrant form gives frozen inputs no gradient, so an adapter would not train.
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers >= 5.24
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model, tokenizer


def method_config(config: FinetuneConfig, encoder_decoder: bool = False) -> Any:
    """What `pyfast.apply` is given for the method of a run."""
    if config.method == "sft":
        return pyfast.SFTConfig()
    # Not the path that the default model has on this machine: PEFT loads it from the hub.
    base = HUB_ID if config.model == "default" else in_full(config.model)
    task = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    about: dict[str, Any] = {"task_type": task, "base_model_name_or_path": base}
    if config.method == "ia3":
        return pyfast.IA3Config(**about)
    if config.method == "p-tuning":
        return pyfast.PromptEncoderConfig(
            num_virtual_tokens=config.prompt.tokens,
            encoder_reparameterization_type=config.prompt.encoder.upper(),
            encoder_hidden_size=config.prompt.hidden,
            **about,
        )
    if config.method == "adapters":
        return pyfast.BottleneckConfig(
            bottleneck_size=config.bottleneck.size,
            placement=config.bottleneck.placement,
            activation=config.bottleneck.activation,
            layer_norm=config.bottleneck.layer_norm,
            bias=config.bottleneck.bias,
            **about,
        )
    options = config.adapter
    return pyfast.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        use_rslora=options.rslora,
        init_lora_weights=True if options.init == "kaiming" else options.init,
        use_dora=options.dora,
        **about,
    )


def learned_positions(model: Any) -> int | None:
    """Length of a learned table of positions that is left for an input, beside virtual tokens; None where
    there is no such table."""
    rows = position_rows(model)
    return None if rows is None else rows - _virtual_tokens(model)


def _virtual_tokens(model: Any) -> int:
    """Virtual tokens in front of an input."""
    return sum(module.length(0) for module in model.modules() if isinstance(module, VirtualTokens))


def _positions_in_words(model: Any) -> str:
    """How many positions a model has, and the prompt's share of them."""
    text = f"{type(model).__name__} has {position_rows(model)} positions"
    virtual = _virtual_tokens(model)
    return f"{text}, of which the virtual tokens take {virtual}" if virtual else text


def check_vocabulary(model: Any, tokenizer: Any, largest: int) -> None:
    """Refuse a token that the model has no embedding for.

    Raises:
        ConfigError: `largest`, the highest token id, is beyond the embeddings.
    """
    size = model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise ConfigError(
            f"the tokenizer's token {tokenizer.convert_ids_to_tokens(largest)!r} is number {largest}, but "
            f"{type(model).__name__} has embeddings for {size} tokens. Fix: the tokenizer of this model."
        )


def check_data(model: Any, tokenizer: Any, data: Data) -> None:
    """Refuse records that have tokens or positions which the model has not.

    Raises:
        ConfigError: A record is too long, or a token is unknown to the model.
    """
    items = [*data.train.items, *data.evaluation.items]
    tokens = (part for item in items for part in (item.tokens, item.source) if len(part))
    check_vocabulary(model, tokenizer, max(int(part.max()) for part in tokens))
    longest = max(items, key=lambda item: max(len(item.tokens), len(item.source)))
    length, positions = max(len(longest.tokens), len(longest.source)), learned_positions(model)
    if positions is not None and length > positions:
        raise ConfigError(
            f"{longest.record.place} has {length} tokens, but {_positions_in_words(model)}. "
            f"Fix: {_fix_of_length(positions, _virtual_tokens(model))}"
        )


def _fix_of_length(left: int, virtual: int) -> str:
    """Flags with which records go beside the virtual tokens."""
    if left >= 2:
        return f"--dataset.max_length {left}" + (
            ", or a smaller --prompt.tokens" if virtual else ""
        )
    half = (left + virtual) // 2
    return f"--prompt.tokens {half} --dataset.max_length {left + virtual - half}"


def _check_prompt(config: FinetuneConfig, model: Any) -> None:
    """Refuse virtual tokens that leave no position for a record, by the name they have on the command line.

    Raises:
        ConfigError: They are as many as the model has positions, or more.
    """
    rows = position_rows(model)
    if config.method == "p-tuning" and rows is not None and config.prompt.tokens >= rows:
        raise ConfigError(
            f"prompt.tokens is {config.prompt.tokens}, but {type(model).__name__} has {rows} positions, for "
            f"the prompt and a record together. Fix: {_fix_of_length(0, rows)}"
        )


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name and parameter of all that trains.

    Raises:
        NoGradientError: Nothing does.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        total = sum(1 for _ in model.parameters())
        raise NoGradientError(
            f"0 of {total} parameters of {type(model).__name__} are trainable, so there is nothing to learn. "
            "Fix: --method lora, or load the adapter with trainable=True."
        )
    return parameters


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the former mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer to a prompt, through the chat template where there is one."""
    return greedy(model, tokenizer, _prompt(model, tokenizer, prompt), max_new_tokens)


def greedy(model: Any, tokenizer: Any, ids: torch.Tensor, max_new_tokens: int) -> str:
    """The text of the likeliest tokens after `ids` [1, length], or of an encoder's answer to them."""
    # An encoder-decoder answers behind its start token alone.
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    if (positions := learned_positions(model)) is not None:
        max_new_tokens = min(max_new_tokens, positions + 1 - start)
    if max_new_tokens < 1:
        return ""
    inputs, lengths = _inputs(model, tokenizer, ids), {"max_new_tokens": max_new_tokens}
    with evaluating(model):
        output = model.generate(**inputs, **lengths, do_sample=False, num_beams=1)
    return str(tokenizer.decode(output[0, start:], skip_special_tokens=True)).strip()


def stream_answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float
) -> None:
    """Write the answer to standard output as it comes.

    Raises:
        ConfigError: The model has no positions for prompt and answer, or no embedding for a token.
    """
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    with evaluating(model):
        inputs = _inputs(model, tokenizer, _prompt(model, tokenizer, prompt))
        length, positions = inputs["input_ids"].shape[1], learned_positions(model)
        if positions is not None and length + max_new_tokens > positions + 1:
            room = positions + 1 - length
            raise ConfigError(
                f"the prompt has {length} tokens and max_new_tokens is {max_new_tokens}, but "
                f"{_positions_in_words(model)}. Fix: "
                f"{f'--max_new_tokens {room}' if room > 0 else 'a shorter prompt'}."
            )
        model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)


def _prompt(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """Tokens [1, length] of a prompt."""
    special = True
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = False  # the template has written them
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)[
        "input_ids"
    ]
    check_vocabulary(model, tokenizer, max(ids[0].tolist(), default=0))
    return ids


def _inputs(model: Any, tokenizer: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of `generate` that hold the prompt."""
    ids = ids.to(model.device)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **ends}


def write_weights(model: Any, tokenizer: Any, directory: Path, method: str) -> None:
    """Write `directory`/adapter in PEFT's form, or under sft `directory`/model with its tokenizer."""
    if method == "sft":
        model.save_pretrained(directory / "model")
        save_tokenizer(tokenizer, directory / "model")
        honour_umask(directory / "model")
    else:
        pyfast.save_adapter(model, directory / "adapter")


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer; what the tokenizers library raises on a full disk has no type of its own.

    Raises:
        OSError: It could not be written.
    """
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error
