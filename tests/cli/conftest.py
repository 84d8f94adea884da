# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, a tiny model with data, and a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pyfast.cli import main
from tests.models import word_llama

Run = Callable[..., tuple[int, str, str]]
SMALL = ["--run.batch_size", 4, "--run.device", "cpu", "--run.dtype", "fp32", "--adapter.r", 4]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama with a word tokenizer."""
    return word_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty records of words that the tokenizer knows."""
    file = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [{"input": f"w{i} w{i + 1}", "output": f"w{(7 * i) % 60} w{i + 2}"} for i in range(30)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="session")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished LoRA run."""
    output = tmp_path_factory.mktemp("runs") / "lora run"
    arguments = [
        "finetune",
        "--model",
        base,
        "--data",
        data,
        "--output_dir",
        output,
        "--run.steps",
        8,
        *SMALL,
    ]
    assert main([str(a) for a in [*arguments, "--optimizer.lr", 0.02]]) == 0
    return output
