# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama with a byte tokenizer, small data files, and runs that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pyfast.train import FinetuneConfig
from pyfast.train.config import AdapterOptions, DatasetOptions, RunOptions
from pyfast.train.loop import Trainer, finetune
from pyfast.train.validate import METHODS
from tests.models import llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def _byte_tokenizer(
    template: str | None = TEMPLATE, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, special tokens whole; `merges` joins neighbours as BPE does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`byte_tokenizer(template, merges)` makes a tokenizer with one token a byte."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random two-layer Llama with a byte tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64}
    ends = {"eos_token_id": 257, "bos_token_id": None, "pad_token_id": 256}
    llama(seed=7, max_position_embeddings=2048, **sizes, **ends).save_pretrained(directory)
    _byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short questions with answers of different lengths."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"what is {i}?", "completion": f"it is {i} {'!' * (i % 7)}"} for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


MakeConfig = Callable[..., FinetuneConfig]


@pytest.fixture
def make_config(tiny_model: Path, data_file: Path, tmp_path: Path) -> MakeConfig:
    """A quick run on the tiny model; keyword arguments go to `run`, or replace whole fields.

    Parts that are of other methods stay as they are by default.
    """

    def make(**changes: Any) -> FinetuneConfig:
        fields: dict[str, Any] = {
            "model": str(tiny_model),
            "data": str(data_file),
            "output_dir": str(tmp_path / "out"),
            "adapter": AdapterOptions(r=4, alpha=8, dropout=0.1),
            "dataset": DatasetOptions(),
        }
        run: dict[str, Any] = {"steps": 6, "batch_size": 2, "accumulation": 2, "dtype": "fp32"}
        run |= {"device": "cpu", "samples": 0, "eval_every": 0, "save_every": 0}
        for name, value in changes.items():
            (fields if name in FinetuneConfig.__dataclass_fields__ else run)[name] = value
        for part, methods in METHODS.items():
            if fields.get("method", "lora") not in methods:
                fields.pop(part, None)
        return FinetuneConfig(**fields, run=RunOptions(**run))

    return make


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[FinetuneConfig, int], None]:
    """Starts a run that Ctrl-C ends ahead of a step."""

    def start(config: FinetuneConfig, step: int) -> None:
        original, calls = Trainer.step, []

        def stopping(trainer: Trainer) -> Any:
            calls.append(1)
            if len(calls) == step:
                raise KeyboardInterrupt
            return original(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", stopping)
            with pytest.raises(KeyboardInterrupt):
                finetune(config)

    return start
