# SPDX-License-Identifier: Apache-2.0
"""Records and prompts that the model has no positions or no embeddings for are refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import pyfast
from pyfast.errors import ConfigError
from pyfast.train import finetune
from pyfast.train.config import DatasetOptions, PromptOptions
from pyfast.train.model import learned_positions, stream_answer
from tests.models import gpt2, llama


def save(directory: Path, tokenizer: Any, **sizes: int) -> Path:
    """A small GPT-2 with a tokenizer of 261 tokens."""
    values = {"vocab_size": 261, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
    config = transformers.GPT2Config(**values | sizes, eos_token_id=1, bos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def long_data(tmp_path: Path) -> Path:
    """Records of 29 to 48 tokens."""
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "q" * i, "completion": f"{i:019}"} for i in range(9, 29)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_records_beyond_the_positions(
    make_config: Any, byte_tokenizer: Callable[..., Any], long_data: Path, tmp_path: Path
) -> None:
    model = save(tmp_path / "gpt2", byte_tokenizer(None))
    options: dict[str, Any] = {"model": str(model), "data": str(long_data), "steps": 1}
    with pytest.raises(
        ConfigError, match=r"long\.jsonl line 20 has 48 tokens, .* 40 pos"
    ) as caught:
        finetune(make_config(**options))
    assert str(caught.value).endswith("Fix: --dataset.max_length 40")
    assert not (tmp_path / "out").exists()
    limit = DatasetOptions(max_length=40)
    result = finetune(make_config(**options, dataset=limit, samples=4))
    assert result.samples  # their answers end at the last position


def test_tokens_beyond_the_vocabulary(
    make_config: Any, byte_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(None)
    model = save(tmp_path / "gpt2", tokenizer, vocab_size=257)
    with pytest.raises(ConfigError, match=r"token '<\|end\|>' is number 257, .* for 257 tokens"):
        finetune(make_config(model=str(model)))
    network = transformers.GPT2LMHeadModel.from_pretrained(model)
    with pytest.raises(ConfigError, match="is number 257"):
        stream_answer(network, tokenizer, "a<|end|>", 2, 0.0)


def test_answers_beyond_the_positions(
    byte_tokenizer: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer(None)
    network = transformers.GPT2LMHeadModel.from_pretrained(save(tmp_path, tokenizer))
    with pytest.raises(ConfigError, match=r"has 30 tokens and .* 12, .*Fix: --max_new_tokens 11\."):
        stream_answer(network, tokenizer, "q" * 30, 12, 0.0)
    stream_answer(network, tokenizer, "q" * 30, 11, 0.0)
    with pytest.raises(ConfigError, match="a shorter prompt"):
        stream_answer(network, tokenizer, "q" * 41, 1, 0.0)


def test_only_learned_positions_are_a_limit() -> None:
    assert learned_positions(gpt2()) == 64
    assert learned_positions(llama()) is None
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=20, word_embed_proj_dim=16)
    assert learned_positions(transformers.OPTForCausalLM(config)) == 20


def test_the_prompts_share_of_the_positions_is_named(
    make_config: Any, byte_tokenizer: Callable[..., Any], long_data: Path, tmp_path: Path
) -> None:
    """GPT-2 with 40 positions; the records have up to 48 tokens."""
    model = save(tmp_path / "gpt2", byte_tokenizer(None))
    options: dict[str, Any] = {"model": str(model), "data": str(long_data), "steps": 1}

    def told(tokens: int, **changes: Any) -> str:
        prompt = PromptOptions(tokens=tokens, hidden=8)
        with pytest.raises(ConfigError) as caught:
            finetune(make_config(**options, method="p-tuning", prompt=prompt, **changes))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    text = told(8)
    assert (
        "line 20 has 48 tokens, but GPT2LMHeadModel has 40 positions, of which the virtual" in text
    )
    assert "tokens take 8. Fix: --dataset.max_length 32, or a smaller --prompt.tokens" in text
    for text in (told(39), told(40), told(200)):
        assert text.endswith("Fix: --prompt.tokens 20 --dataset.max_length 20")
    assert "prompt.tokens is 200, but GPT2LMHeadModel has 40 positions" in text
    prompt, limit = PromptOptions(tokens=8, hidden=8), DatasetOptions(max_length=32)
    finetune(make_config(**options, method="p-tuning", prompt=prompt, dataset=limit, samples=2))


def test_a_prompt_and_an_answer_beyond_the_positions(
    byte_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(None)
    network = transformers.GPT2LMHeadModel.from_pretrained(save(tmp_path, tokenizer))
    pyfast.apply(network, pyfast.PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=8))
    with pytest.raises(ConfigError, match=r"take 8\. Fix: --max_new_tokens 3\."):
        stream_answer(network, tokenizer, "q" * 30, 12, 0.0)
    stream_answer(network, tokenizer, "q" * 30, 3, 0.0)
