# SPDX-License-Identifier: Apache-2.0
"""Choose where and in what a model computes, put the method on it, ask it, write it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyfast
from pyfast.errors import ConfigError, NoGradientError
from pyfast.train.config import FinetuneConfig, RunOptions
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"run.device is {name!r}: {reason}. Fix: run.device=auto.") from error
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
    model, tokenizer = load_pretrained(source, dtype, place.device)
    options = config.adapter
    if config.method == "sft":
        pyfast.apply(model, pyfast.SFTConfig())
    else:
        if config.method == "qlora" and getattr(model.config, "quantization_config", None) is None:
            pyfast.quantize(model, blocksize=config.quant.blocksize, nested=config.quant.nested)
        lora = pyfast.LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=options.targets,
            use_rslora=options.rslora,
            task_type="CAUSAL_LM",
            # Not the path that the default model has on this machine: PEFT loads it from the hub.
            base_model_name_or_path=HUB_ID if config.model == "default" else config.model,
        )
        pyfast.apply(model, lora)
    if config.run.activation_checkpointing:
        # The reentrant form gives frozen inputs no gradient, so an adapter would not train.
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers >= 5.24
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model, tokenizer


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
            "Fix: method=lora, or load the adapter with trainable=True."
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


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 48) -> str:
    """The model's greedy answer to a prompt, through the chat template where there is one."""
    inputs = _prompt(model, tokenizer, prompt)
    with evaluating(model):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    start = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(output[0, start:], skip_special_tokens=True)).strip()


def stream_answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float
) -> None:
    """Write the answer to standard output as it comes."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    with evaluating(model):
        inputs = _prompt(model, tokenizer, prompt)
        model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)


def _prompt(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """Arguments of `generate` that hold the prompt."""
    special = True
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = False  # the template has written them
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)["input_ids"]
    ids = ids.to(model.device)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **ends}


def write_weights(model: Any, tokenizer: Any, directory: Path, method: str) -> None:
    """Write `directory`/adapter in PEFT's form, or under sft `directory`/model with its tokenizer."""
    if method == "sft":
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
    else:
        pyfast.save_adapter(model, directory / "adapter")
