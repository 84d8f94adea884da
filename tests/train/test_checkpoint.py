# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyfast.errors import CheckpointCorruptError, CheckpointWriteError, ResumeError
from pyfast.train import checkpoint as ckpt
from pyfast.train.checkpoint import Progress


class Toy:
    """Two parameters under AdamW, and what a checkpoint of them holds."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {
            name: torch.nn.Parameter(torch.randn(shape, generator=generator))
            for name, shape in (("a", (3, 2)), ("b.c", (4,)))
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape)
        self.optimizer.step()

    def save(self, directory: Path, step: int, keep_last: int = 2) -> Path:
        return ckpt.save(
            directory,
            ckpt.training_tensors(self.parameters, self.optimizer, with_parameters=True),
            ckpt.trainer_values(Progress(step=step, tokens=step * 10), {"lr": 0.1}),
            lambda path: (path / "adapter.txt").write_text("weights") and None,
            keep_last,
        )

    def restore(self, directory: Path) -> None:
        ckpt.restore(ckpt.load(directory), self.parameters, self.optimizer, with_parameters=True)


def test_everything_comes_back(tmp_path: Path) -> None:
    toy = Toy()
    toy.step()
    toy.save(tmp_path, 1)
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    toy.step()

    other = Toy(seed=1)
    other.restore(tmp_path)
    assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == draws
    other.step()
    for name, parameter in toy.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
    assert ckpt.load(tmp_path).progress == Progress(step=1, tokens=10)


def test_only_json_and_safetensors_are_written(tmp_path: Path) -> None:
    toy = Toy()
    toy.step()
    path = toy.save(tmp_path, 1)
    names = {file.name for file in path.iterdir()}
    assert names == {"manifest.json", "trainer.json", "training.safetensors", "adapter.txt"}
    json.loads((path / "trainer.json").read_text())


def test_oldest_are_dropped_and_strays_removed(tmp_path: Path) -> None:
    toy = Toy()
    (tmp_path / ".tmp-step-000009").mkdir(parents=True)
    (tmp_path / ".tmp-step-000009" / "half").write_text("x")
    for step in (1, 2, 3):
        toy.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert ckpt.read_latest(tmp_path) == "step-000003"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    toy = Toy()
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        assert toy.save(tmp_path, step).is_dir()
        assert ckpt.load(tmp_path).progress.step == step
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-1000000", "step-1000001"]


def test_step_that_was_left_without_latest_is_replaced(tmp_path: Path) -> None:
    toy = Toy()
    toy.save(tmp_path, 1)
    toy.save(tmp_path, 2)
    (tmp_path / "latest").write_text("step-000001\n")  # as if killed before `latest` was replaced
    (tmp_path / "step-000002" / "adapter.txt").write_text("other")
    toy.save(tmp_path, 2)
    assert (ckpt.load(tmp_path).path / "adapter.txt").read_text() == "weights"


def damaged(tmp_path: Path, how: str) -> tuple[Path, str]:
    toy = Toy()
    toy.step()
    toy.save(tmp_path, 1)
    path = toy.save(tmp_path, 2)
    name = how.split(":")[1]
    file = path / name
    content = bytearray(file.read_bytes()) if file.exists() else bytearray()
    match how.split(":")[0]:
        case "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "remove":
            file.unlink()
        case "add":
            file.write_text("x")
    return path, name


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("flip:training.safetensors", "SHA-256 differs"),
        ("flip:trainer.json", "SHA-256 differs"),
        ("flip:adapter.txt", "SHA-256 differs"),
        ("cut:training.safetensors", "bytes"),
        ("cut:manifest.json", "unreadable"),
        ("remove:adapter.txt", "the file is missing"),
        ("remove:manifest.json", "unreadable"),
        ("add:more.txt", "does not belong"),
    ],
)
def test_damage_is_named_and_nothing_changes(tmp_path: Path, how: str, what: str) -> None:
    path, name = damaged(tmp_path, how)
    toy = Toy(seed=3)
    before = {key: parameter.clone() for key, parameter in toy.parameters.items()}
    rng = torch.get_rng_state()
    with pytest.raises(CheckpointCorruptError) as caught:
        toy.restore(tmp_path)
    assert f"'{path / name}': " in str(caught.value)
    assert what in str(caught.value)
    assert "step-000001" in str(caught.value)
    assert all(torch.equal(before[key], toy.parameters[key]) for key in before)
    assert torch.equal(rng, torch.get_rng_state())
    assert not toy.optimizer.state
    (tmp_path / "latest").write_text("step-000001\n")  # the fix that the message names
    toy.restore(tmp_path)


def test_every_single_bit_flip_is_found(tmp_path: Path) -> None:
    toy = Toy()
    toy.step()
    path = toy.save(tmp_path, 1)
    draw = random.Random(0)
    for name in ("training.safetensors", "trainer.json", "adapter.txt"):
        content = (path / name).read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(changed)
            with pytest.raises(CheckpointCorruptError):
                ckpt.load(tmp_path)
        (path / name).write_bytes(content)
    ckpt.load(tmp_path)


@pytest.mark.parametrize(
    "entries", ['{"files": 3}', "[]", '{"files": {"trainer.json": {}}}', "\x00"]
)
def test_hostile_manifest(tmp_path: Path, entries: str) -> None:
    path = Toy().save(tmp_path, 1)
    (path / "manifest.json").write_text(entries)
    with pytest.raises(CheckpointCorruptError, match="manifest"):
        ckpt.load(tmp_path)


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = Toy().save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointCorruptError, match="the file is missing"):
        ckpt.load(tmp_path)


@pytest.mark.parametrize("latest", ["../outside", "step-000077", "", "\x00"])
def test_latest_that_names_no_checkpoint(tmp_path: Path, latest: str) -> None:
    Toy().save(tmp_path, 1)
    (tmp_path / "latest").write_text(latest)
    with pytest.raises(CheckpointCorruptError, match="step-000001"):
        ckpt.load(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no checkpoint"):
        ckpt.load(tmp_path)


def test_missing_part_is_an_error(tmp_path: Path) -> None:
    toy = Toy()
    toy.step()
    tensors = ckpt.training_tensors(toy.parameters, toy.optimizer, with_parameters=True)
    del tensors["optimizer.exp_avg.b.c"]
    values = ckpt.trainer_values(Progress(step=1), {})
    ckpt.save(tmp_path, tensors, values, lambda path: None, 2)
    fresh = Toy(seed=1)
    with pytest.raises(
        ResumeError, match=r"lacks 1 of \d+ parts \(first: optimizer\.exp_avg\.b\.c\)"
    ):
        fresh.restore(tmp_path)
    assert not fresh.optimizer.state


def test_other_shape_is_an_error(tmp_path: Path) -> None:
    toy = Toy()
    toy.step()
    toy.save(tmp_path, 1)
    toy.parameters["a"] = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        ResumeError, match=r"parameter\.a has shape \(3, 2\), this run needs \(3, 3\)"
    ):
        toy.restore(tmp_path)


def test_other_settings_are_named(tmp_path: Path) -> None:
    Toy().save(tmp_path, 1)
    with pytest.raises(ResumeError, match=r"lr \(saved 0\.1, now 0\.2\)"):
        ckpt.check_settings(ckpt.load(tmp_path), {"lr": 0.2})
    ckpt.check_settings(ckpt.load(tmp_path), {"lr": 0.1})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "rename", "model", "mkdir"])
def test_failing_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    toy = Toy()
    toy.save(tmp_path, 1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    values = ckpt.trainer_values(Progress(step=2), {})
    tensors = ckpt.training_tensors(toy.parameters, toy.optimizer, with_parameters=True)
    with monkeypatch.context() as patch:
        match call:
            case "fsync":
                patch.setattr(os, "fsync", fail)
            case "rename":
                patch.setattr(Path, "rename", fail)
            case "mkdir":
                patch.setattr(Path, "mkdir", fail)
        write_model = fail if call == "model" else lambda path: None
        with pytest.raises(CheckpointWriteError) as caught:
            ckpt.save(tmp_path, tensors, values, write_model, 2)
    text = str(caught.value)
    assert f"cannot write checkpoint '{tmp_path / 'step-000002'}'" in text
    assert "step-000001 is intact" in text
    assert ("MB are free" in text) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]
    ckpt.load(tmp_path)
    ckpt.save(tmp_path, tensors, values, lambda path: None, 2)
    assert ckpt.read_latest(tmp_path) == "step-000002"


def test_order_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced before the rename, the parent after it, and `latest` comes last."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def log_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def log_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return rename(self, target)

    def log_replace(self: Path, target: Path) -> Path:
        events.append(f"replace {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "rename", log_rename)
    monkeypatch.setattr(Path, "replace", log_replace)
    Toy().save(tmp_path, 1)
    cut = events.index("rename .tmp-step-000001")
    synced = {event.removeprefix("fsync ") for event in events[:cut]}
    assert synced == {
        "manifest.json", "trainer.json", "training.safetensors", "adapter.txt", ".tmp-step-000001",
    }  # fmt: skip
    assert events[cut + 1 :] == [
        f"fsync {tmp_path.name}", "fsync .tmp-latest", "replace latest", f"fsync {tmp_path.name}",
    ]  # fmt: skip
