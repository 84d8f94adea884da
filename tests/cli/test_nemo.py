# SPDX-License-Identifier: Apache-2.0
"""`pyfast convert` to and from NeMo's form of LoRA: directories, `.nemo` archives, refusals."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from pyfast.integrations.nemo_lora import NemoLora, from_nemo
from tests.cli.conftest import Run
from tests.cli.test_weights import adapted_logits


def archive(path: Path, members: dict[str, Any]) -> Path:
    """A tar file as NeMo makes it, with the members' names relative to the directory it was made of."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = io.BytesIO()
            if name.endswith(".yaml"):
                data.write(yaml.safe_dump(content).encode())
            else:
                torch.save(content, data)
            info = tarfile.TarInfo(f"./{name}")
            info.size = data.tell()
            data.seek(0)
            file.addfile(info, data)
    return path


def release_1(rank: int = 4, **settings: Any) -> dict[str, Any]:
    """Members of an archive that has an adapter of the test model's query, key and value."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        start = (
            f"model.module.decoder.layers.{layer}.self_attention.adapter_layer.lora_kqv_adapter."
        )
        tensors[f"{start}linear_in.weight"] = torch.randn(rank, 64, generator=generator)
        tensors[f"{start}linear_out.weight"] = torch.randn(128, rank, generator=generator)
    lora = {"adapter_dim": rank, "adapter_dropout": 0.1, "variant": "nemo", **settings}
    config = {"hidden_size": 64, "peft": {"peft_scheme": "lora", "lora_tuning": lora}}
    return {"model_weights.ckpt": tensors, "model_config.yaml": config}


@pytest.mark.parametrize("form", ["nemo", "nemo_canonical", "nemo1", "nemo1_canonical"])
def test_to_nemo_and_back(run: Run, base: Path, trained: Path, tmp_path: Path, form: str) -> None:
    adapter = trained / "adapter"
    there = ["--source", adapter, "--output", tmp_path / "n", "--form", form, "--stack", "true"]
    assert run("convert", *there)[0] == 0
    assert {file.name for file in (tmp_path / "n").iterdir()} == {
        "nemo_lora.safetensors",
        "nemo_lora.json",
    }
    settings = json.loads((tmp_path / "n" / "nemo_lora.json").read_text())
    assert settings["dim"] == (4 if "canonical" in form else 12)
    back = ["--source", tmp_path / "n", "--output", tmp_path / "p", "--model", base]
    assert run("convert", *back)[0] == 0
    torch.testing.assert_close(
        adapted_logits(base, tmp_path / "p"), adapted_logits(base, adapter), rtol=1e-10, atol=1e-10
    )
    merge = ["merge", "--adapter", tmp_path / "p", "--output", tmp_path / "m", "--dtype", "fp32"]
    assert run(*merge)[0] == 0
    if "canonical" in form:
        before, after = (
            load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path / "p")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("settings", "alpha", "dropout"),
    [({}, 4, 0.0), ({"alpha": 8, "dropout_position": "pre"}, 8, 0.1)],
)
def test_an_archive(
    run: Run, base: Path, tmp_path: Path, settings: dict[str, Any], alpha: int, dropout: float
) -> None:
    members = release_1(**settings)
    source = archive(tmp_path / "a.nemo", members)
    command = ["convert", "--source", source, "--output", tmp_path / "p", "--model", base]
    status, _, err = run(*command)
    assert (status, err.count("\n")) == (2, 1)
    assert "--trust_pickle true" in err
    assert run(*command, "--trust_pickle", "true")[0] == 0
    fields = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base)
    assert (fields["lora_alpha"], fields["lora_dropout"]) == (alpha, dropout)
    adapter = NemoLora(members["model_weights.ckpt"], 4, alpha)
    expected, _ = from_nemo(adapter, AutoConfig.from_pretrained(base))
    written = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in written.items())
    assert run("merge", "--adapter", tmp_path / "p", "--output", tmp_path / "m")[0] == 0


class Code:
    """What must not run."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


def damaged(directory: Path) -> dict[str, Path]:
    """Archives that cannot be read, by what the error says."""
    parts = {f"mp_rank_0{i}/model_weights.ckpt": {} for i in range(2)}
    tied = release_1(weight_tying=True)
    other = release_1() | {"model_config.yaml": {"peft": {"peft_scheme": "ia3"}}}
    made = {
        "tensor and pipeline size 1": parts | {"model_config.yaml": {}},
        "weight_tying": tied,
        "so it is no LoRA adapter": other,
        "holds more than tensors": release_1() | {"model_weights.ckpt": Code()},
        "a dictionary of tensors": release_1() | {"model_weights.ckpt": [1]},
        "dim='x'": release_1()
        | {"model_config.yaml": {"peft": {"lora_tuning": {"adapter_dim": "x"}}}},
    }
    found = {text: archive(directory / f"{i}.nemo", m) for i, (text, m) in enumerate(made.items())}
    found["is damaged"] = directory / "text.nemo"
    found["is damaged"].write_text("no archive")
    return found


def test_archives_that_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    for text, source in damaged(tmp_path).items():
        command = ["convert", "--source", source, "--output", tmp_path / "p", "--model", base]
        status, _, err = run(*command, "--trust_pickle", "true")
        assert (status, err.count("\n")) == (2, 1), err
        assert text in err
        assert not (tmp_path / "p").exists()


def test_what_is_missing(run: Run, base: Path, trained: Path, tmp_path: Path) -> None:
    adapter = trained / "adapter"
    source = archive(tmp_path / "a.nemo", release_1())
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "nemo_lora.json").write_text('{"dim": 4, "alpha": 4, "dropout": 0}')
    commands = {
        "does not name its base model. Fix: --model": ["--source", source],
        "--form nemo is for an adapter in PEFT's form": ["--source", base, "--form", "nemo"],
        "stack them": ["--source", adapter, "--form", "nemo"],
        "nemo_lora.safetensors' is missing": ["--source", tmp_path / "n", "--model", base],
        "--form nemo1 is for": ["--source", source, "--form", "nemo1", "--model", base],
    }
    for text, command in commands.items():
        status, _, err = run("convert", *command, "--output", tmp_path / "p")
        assert (status, err.count("\n")) == (2, 1), err
        assert text in err
        assert not (tmp_path / "p").exists()
