# SPDX-License-Identifier: Apache-2.0
"""Settings that belong to one method, and what is said of those of another; adapters that do not merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pyfast.train.command import program
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--method", "ia3", "--adapter.r", 4], "adapter.r is 4, which is for lora and qlora"),
        (
            ["--method", "sft", "--adapter.dora"],
            "adapter.dora is True, which is for lora and qlora",
        ),
        (["--config", "FILE", "--method", "sft"], "prompt.tokens is 4, which is for p-tuning"),
    ],
)
def test_settings_of_another_method_are_refused(
    run: Run, base: Path, data: Path, tmp_path: Path, flags: list[object], text: str
) -> None:
    file, output = tmp_path / "c.yaml", tmp_path / "out"
    file.write_text("prompt:\n  tokens: 4\n")
    given = [file if flag == "FILE" else flag for flag in flags]
    status, _, err = run(
        "finetune", "--model", base, "--data", data, "--output_dir", output, *given
    )
    assert status == 2
    assert text in err
    assert "Fix: leave it out, or --method " in err
    assert not output.exists()


@pytest.mark.parametrize("method", ["ia3", "sft", "p-tuning", "adapters"])
def test_a_saved_config_holds_all_defaults_and_resumes(
    run: Run, base: Path, data: Path, tmp_path: Path, method: str
) -> None:
    output = tmp_path / "out"
    place = ("--run.device", "cpu", "--run.dtype", "fp32", "--run.samples", 0, "--run.steps", 1)
    common = ("--model", base, "--data", data, "--output_dir", output, "--method", method)
    assert run("finetune", *common, *place)[0] == 0
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["adapter"]["r"] == 16
    status, _, err = run("finetune", "--config", output / "config.yaml", "--resume")
    assert status == 0, err
    if method in ("p-tuning", "adapters"):
        status, _, err = run(
            "merge", "--adapter", output / "adapter", "--output", tmp_path / "merged"
        )
        assert status == 2
        assert "cannot be merged into weights: it " in err
        command = err.partition("Fix: use it as it is: ")[2]
        assert command == f"{program()} generate --adapter {output / 'adapter'}\n"
        assert not (tmp_path / "merged").exists()
