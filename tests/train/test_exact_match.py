# SPDX-License-Identifier: Apache-2.0
"""Exact match: SQuAD's normalisation, what is asked and compared, and runs that report it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyfast.errors import ConfigError
from pyfast.train.config import AdapterOptions, DatasetOptions, OptimizerOptions
from pyfast.train.data import tokenize, tokenize_apart
from pyfast.train.exact_match import chosen, exact_match, normalized, parts
from pyfast.train.forms import Record
from pyfast.train.loop import finetune
from pyfast.train.metrics import read_metrics
from pyfast.train.pretrained import load_pretrained
from pyfast.train.validate import validate
from tests.family_models import variant


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("an  apple,\na pear", "apple pear"),
        ("Theatre and another", "theatre and another"),
        ("U.S.A. (1990-91)", "usa 199091"),
        ("\u00c9t\u00e9 \u2014 the end!", "\u00e9t\u00e9 \u2014 end"),
        ("the-a", "thea"),
        ("The", ""),
    ],
)
def test_normalisation_is_squads(text: str, expected: str) -> None:
    """Values by the rules of evaluate-v1.1.py: lower case, ASCII punctuation away, articles, white space."""
    assert normalized(text) == expected


def test_the_last_answer_is_asked_for(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    turns = (("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two"))
    (item,) = tokenize([Record(turns, False, "f", 1)], tokenizer, 512).items
    asked, expected = (tokenizer.decode(tokens) for tokens in parts(item))
    assert expected == "two<|end|>"
    assert asked.endswith("<|user|>b?<|end|>\n<|assistant|>")
    assert "<|assistant|>one<|end|>" in asked


def test_prompt_and_completion_without_a_template(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(None)
    (item,) = tokenize([Record.pair("2 + 2 =", " 4", "f", 1)], tokenizer, 512).items
    assert [tokenizer.decode(t) for t in parts(item)] == ["2 + 2 =", " 4<|end|>"]


def test_encoder_decoder(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(None)
    (item,) = tokenize_apart([Record.pair("2 + 2 =", "4", "f", 1)], tokenizer, 512).items
    asked, expected = (tokenizer.decode(t) for t in parts(item))
    assert asked.startswith("2 + 2 =")
    assert expected == "4<|end|>"


def test_records_are_spread_and_none_is_cut(byte_tokenizer: Any) -> None:
    records = [Record.pair("q" * 9, "a" * n, "f", n) for n in range(1, 41)]
    items = tokenize(records, byte_tokenizer(None), 40).items
    lengths = [len(item.tokens) for item in chosen(items, 5, 40)]
    assert lengths == sorted(set(lengths))
    assert (lengths[0], lengths[-1], len(lengths)) == (11, 39, 5)
    assert len(chosen(items, 1000, 40)) == 29


def answers(directory: Path) -> Path:
    """Questions of one answer, which can be learned in a few steps."""
    file = directory / "constant.jsonl"
    rows = [{"prompt": f"q{i}", "completion": "Yes."} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("method", "expected"), [("sft", 100), ("p-tuning", 0)])
def test_a_run_reports_it_beside_the_loss(
    make_config: Any,
    tmp_path: Path,
    method: str,
    expected: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All weights of a random model learn the answer, virtual tokens in front of it do not."""
    config = make_config(
        data=str(answers(tmp_path)),
        method=method,
        steps=30,
        batch_size=8,
        eval_every=15,
        dataset=DatasetOptions(split_by="prompt", eval_fraction=0.3),
        optimizer=OptimizerOptions(lr=2e-2),
        predict_with_generate=True,
        max_predict_samples=4,
        max_new_tokens=8,
    )
    result = finetune(config)
    assert (result.exact_match_before, result.exact_match) == (0, expected)
    rows = [r for r in read_metrics(result.output_dir / "metrics.jsonl") if "eval_loss" in r]
    assert [row["step"] for row in rows] == [0, 15, 30]
    assert rows[0]["eval_exact_match"] == 0
    assert rows[-1]["eval_exact_match"] == result.exact_match
    out = capsys.readouterr().out
    assert f"exact match {result.exact_match:.1f} %" in out
    assert f"Exact match:   0.0 % before, {result.exact_match:.1f} % after." in out


def test_an_encoder_decoder_run(make_config: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    ends = {"eos_token_id": 257, "pad_token_id": 256, "decoder_start_token_id": 256}
    variant("t5", vocab_size=272, **ends).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    config = make_config(
        model=str(tmp_path / "t5"),
        data=str(answers(tmp_path)),
        steps=30,
        batch_size=8,
        dataset=DatasetOptions(split_by="prompt", eval_fraction=0.3),
        adapter=AdapterOptions(r=16, alpha=64),
        optimizer=OptimizerOptions(lr=2e-2),
        predict_with_generate=True,
        max_predict_samples=4,
        max_new_tokens=8,
    )
    result = finetune(config)
    assert (result.exact_match_before, result.exact_match) == (0, 100)


def test_percentage_is_that_of_transformers_own_answers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the expected answers are what `generate` says, up to case and a full stop."""
    model, tokenizer = load_pretrained(str(tiny_model), torch.float32, torch.device("cpu"))
    records, calls = [], []
    for number in range(6):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"q{number}"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = model.generate(**ids, max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = f"The {text.upper()}." if number % 2 else "something else"
        records.append(Record.pair(f"q{number}", answer, "f", number))
    items = tokenize(records, tokenizer, 512).items
    original = type(model).generate

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["max_new_tokens"])
        return original(*args, **options)

    monkeypatch.setattr(type(model), "generate", counted)
    model.train()
    assert exact_match(model, tokenizer, items, 4) == 50
    assert calls == [4] * 6
    assert model.training
    assert exact_match(model, tokenizer, [], 4) is None


def test_it_changes_nothing_of_the_run(make_config: Any, tmp_path: Path) -> None:
    files = []
    for asked in (False, True):
        config = make_config(output_dir=str(tmp_path / str(asked)), eval_every=2)
        config.run.predict_with_generate, config.run.max_predict_samples = asked, 2
        result = finetune(config)
        files.append(load_file(result.weights / "adapter_model.safetensors"))
        assert (result.exact_match is not None) is asked
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_settings_out_of_range(make_config: Any) -> None:
    for name in ("max_predict_samples", "max_new_tokens"):
        with pytest.raises(ConfigError, match=rf"run\.{name} is 0"):
            validate(make_config(**{name: 0}))
