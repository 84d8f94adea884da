# SPDX-License-Identifier: Apache-2.0
"""Sample answers before and after a run: whose questions are asked, how, and how long the answers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfast.train import finetune
from pyfast.train.config import DatasetOptions
from pyfast.train.pretrained import load_pretrained
from tests.train.test_forms import NEMO


def chats(file: Path, count: int = 12) -> str:
    """Multi-turn records in NeMo's form, with a system turn."""
    rows = []
    for i in range(count):
        turns = [dict(turn, value=f"{turn['value']} {i}") for turn in NEMO["conversations"]]
        rows.append({**NEMO, "conversations": turns})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_chat_is_asked_for_its_last_answer(
    make_config: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: transformers' template and generate."""
    config = make_config(data=chats(tmp_path / "d.jsonl"), samples=1, steps=1, max_new_tokens=5)
    (row,) = finetune(config).samples
    number = row["reference"].removeprefix("ciao ")
    assert row["prompt"] == "\n".join(
        ["be brief", f"hi {number}", f"hello {number}", f"user bye {number}"]
    )
    out = capsys.readouterr().out
    assert f"Q: {row['prompt']}\n   before: " in out
    model, tokenizer = load_pretrained(str(tiny_model), torch.float32, torch.device("cpu"))
    roles = ["system", "user", "assistant", "user"]
    turns = zip(roles, row["prompt"].split("\n"), strict=True)
    messages = [{"role": role, "content": text} for role, text in turns]
    given = {"return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
    inputs = tokenizer.apply_chat_template(messages, **given)
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert row["before"] == expected.strip()


def test_a_resumed_run_asks_the_same_chat(make_config: Any, tmp_path: Path, interrupt: Any) -> None:
    options = {"data": chats(tmp_path / "d.jsonl"), "samples": 2, "max_new_tokens": 5}
    whole = finetune(make_config(**options, output_dir=str(tmp_path / "whole")))
    config = make_config(**options, output_dir=str(tmp_path / "cut"), save_every=3)
    interrupt(config, step=4)
    config.resume = True
    assert finetune(config).samples == whole.samples


def test_max_new_tokens_limits_them(make_config: Any, tmp_path: Path) -> None:
    """The random model's bytes are none of the special tokens that decoding leaves out."""
    found = []
    for limit in (3, 60):
        output = str(tmp_path / str(limit))
        run = make_config(samples=2, steps=1, max_new_tokens=limit, output_dir=output)
        found.append([row["before"] for row in finetune(run).samples])
    for short, long in zip(*found, strict=True):
        assert len(short) <= 3
        assert len(long) > 48
        assert long.startswith(short.rstrip("\ufffd"))


def test_none_at_all_is_told(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = DatasetOptions(max_length=40)  # cuts the last answer of each record
    finetune(make_config(data=chats(tmp_path / "d.jsonl"), samples=1, steps=1, dataset=options))
    assert "No sample answers: no held-out record ends with an answer" in capsys.readouterr().out
