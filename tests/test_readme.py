# SPDX-License-Identifier: Apache-2.0
"""Every block of code in the README runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from pyfast.cli import main
from pyfast.cli.matrix import table
from pyfast.train.config import DatasetOptions
from pyfast.train.records import read_records
from tests.models import word_llama

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the working directory."""
    monkeypatch.chdir(tmp_path)
    return word_llama(tmp_path / "my-model")  # type: ignore[no-any-return]


def test_no_block_is_left_out() -> None:
    assert {name for name, _ in BLOCKS} == {"", "python", "sh", "json"}
    assert all(line.startswith("make ") for text in blocks("") for line in text.splitlines())


def test_python(model: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    names: dict[str, Any] = {
        "path": model,
        "peft_model": peft.get_peft_model(load(model), lora),
        "bitsandbytes_model": load(model, quantization_config=four_bits),
    }
    for block in blocks("python"):
        exec(block, names)


def test_peft_refuses_what_the_readme_says_it_refuses(model: Path) -> None:
    import pyfast

    quantized = pyfast.quantize(transformers.AutoModelForCausalLM.from_pretrained(model))
    with pytest.raises(ValueError, match=r"NF4Linear.* is not supported"):
        peft.get_peft_model(quantized, peft.LoraConfig(target_modules=["q_proj"]))


def test_commands(model: Path) -> None:
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{3 * i}"} for i in range(20)]
    Path("train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    commands = [line for text in blocks("sh") for line in text.splitlines() if line]
    assert {command.split()[1] for command in commands} == {
        *("finetune", "generate", "merge", "quantize", "convert", "info")
    }
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


def test_families_and_methods() -> None:
    assert f"\n\n{table()}\n\n" in README.partition("## What works\n")[2]


def test_records(tmp_path: Path) -> None:
    lines = [line for text in blocks("json") for line in text.splitlines()]
    for number, line in enumerate(lines):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(line)
        (record,) = read_records([str(file)], DatasetOptions()).records
        assert record.prompt
        assert record.answer
    assert len(lines) == 5
