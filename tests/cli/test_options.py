# SPDX-License-Identifier: Apache-2.0
"""Flags of `finetune` that choose optimiser, rates, initial values and what is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import SMALL, Run
from tests.family_models import variant


def test_all_of_them_in_one_run(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    status, out, err = run(
        *("finetune", "--model", base, "--data", data, "--output_dir", output, *SMALL),
        *("--run.steps", 2, "--run.samples", 0, "--run.predict_with_generate"),
        *("--run.max_predict_samples", 2, "--run.max_new_tokens", 4),
        *("--optimizer.name", "adamw_8bit", "--optimizer.loraplus_lr_ratio", 16),
        *("--adapter.init", "pissa_niter_4", "--adapter.dora"),
    )
    assert status == 0, err
    assert "Exact match:" in out
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["run"]["predict_with_generate"] is True
    assert config["run"]["max_predict_samples"] == 2
    assert config["optimizer"]["name"] == "adamw_8bit"
    assert config["optimizer"]["loraplus_lr_ratio"] == 16
    assert json.loads((output / "result.json").read_text())["exact_match"] is not None
    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter["init_lora_weights"] == "pissa_niter_4"
    assert adapter["use_dora"] is True
    status, out, _ = run(
        "generate", "--adapter", output / "adapter", "--prompt", "w1", "--max_new_tokens", 2
    )
    assert status == 0
    status, _, err = run(
        *("finetune", "--config", output / "config.yaml", "--resume"),
        *("--run.predict_with_generate", "false"),
    )
    assert status == 0, err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--optimizer.name", "sgd"],
            "optimizer.name is 'sgd'; it must be one of adamw, adamw_8bit",
        ),
        (["--run.predict_with_generate", "maybe"], "is 'maybe'; it must be true or false"),
    ],
)
def test_values_that_are_none_of_the_allowed(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    with pytest.raises(SystemExit):
        run("finetune", *flags)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--method", "qlora", "--adapter.init", "pissa"], "qlora rounds them to NF4 first"),
        (
            ["--method", "ia3", "--adapter.r", "16", "--optimizer.loraplus_lr_ratio", "4"],
            "is for lora and qlora",
        ),
        (["--optimizer.name", "paged_adamw_8bit"], "--optimizer.name adamw_8bit"),
    ],
)
def test_settings_that_do_not_go_together(
    run: Run, base: Path, data: Path, tmp_path: Path, flags: list[str], text: str
) -> None:
    output = tmp_path / "out"
    common = ("--model", base, "--data", data, "--output_dir", output, *SMALL)
    status, _, err = run("finetune", *common, *flags)
    assert status == 2
    assert text in err
    assert not output.exists()


def test_experts_by_their_name_alone(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "mixtral", tmp_path / "out"
    variant("mixtral").save_pretrained(model)
    for file in base.glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    status, _, err = run(
        *("finetune", "--model", model, "--data", data, "--output_dir", output, *SMALL),
        *("--run.steps", 1, "--run.samples", 0, "--adapter.targets", "experts"),
    )
    assert status == 0, err
    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
