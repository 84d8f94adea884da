# SPDX-License-Identifier: Apache-2.0
"""An output directory belongs to one run at a time, and a disk that fails is told in a sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pyfast.errors import CheckpointWriteError, ConfigError
from pyfast.train import checkpoint as ckpt
from pyfast.train import finetune, loop, run
from pyfast.train.metrics import Metrics
from pyfast.train.model import save_tokenizer


def files(directory: Path) -> dict[Path, bytes]:
    """What the files hold; TensorBoard's are written by a thread, so of those only the names."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path: b"" if "tfevents" in path.name else path.read_bytes() for path in found}


def test_second_run_in_one_directory_is_refused(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=2)
    output, step = Path(config.output_dir), loop.Trainer.step

    def step_beside_another_run(trainer: loop.Trainer) -> dict[str, float]:
        monkeypatch.setattr(loop.Trainer, "step", step)
        before = files(output)
        with pytest.raises(ConfigError, match="is being written by another run"):
            finetune(config)
        assert files(output) == before
        return step(trainer)

    monkeypatch.setattr(loop.Trainer, "step", step_beside_another_run)
    assert finetune(config).steps == 2


def test_run_that_finished_meanwhile_is_kept(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the directory empty; the slower one finds it written when it is about to write."""
    config = make_config(steps=2)
    load, output = loop.load_data, Path(config.output_dir)

    def load_slowly(*arguments: Any) -> Any:
        monkeypatch.setattr(loop, "load_data", load)
        finetune(config)
        return load(*arguments)

    monkeypatch.setattr(loop, "load_data", load_slowly)
    with pytest.raises(ConfigError, match="has just been written by another run"):
        finetune(config)
    assert ckpt.load(output / "checkpoints").progress.step == 2


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FULL, SafetensorError("No space left on device")], ids=str)
@pytest.mark.parametrize(
    ("owner", "name", "state"),
    [
        (Metrics, "evaluation", "There is no checkpoint. Fix: free space or allow writing there, then start"),
        (loop, "finish", "The checkpoint step-000002 is intact. Fix: .* --resume true"),
        (run, "write_weights", "The checkpoint step-000002 is intact. Fix: .* --resume true"),
    ],
)  # fmt: skip
def test_full_disk_is_told_in_a_sentence(
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    owner: Any,
    name: str,
    state: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    config = make_config(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(CheckpointWriteError, match=state) as caught:
            finetune(config)
    text = str(caught.value)
    assert "No space left on device" in text
    assert "\n" not in text
    assert not list(Path(config.output_dir).rglob(".tmp*"))
    config.resume = "--resume true" in text  # the fix that the message names
    assert finetune(config).steps == 2


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("method", ["lora", "sft"])
def test_files_have_the_mode_that_the_umask_gives(
    make_config: Any, tmp_path: Path, method: str, umask: int
) -> None:
    config = make_config(method=method, steps=2)
    before = os.umask(umask)
    try:
        finetune(config)
        (tmp_path / "ordinary").touch()
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode for path in files(Path(config.output_dir))}
    assert {"training.safetensors", "manifest.json"} < {path.name for path in found}
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {path for path, mode in found.items() if mode != expected} == set()


def test_tokenizer_that_cannot_be_written(
    byte_tokenizer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()

    def fail(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="os error 28"):
        save_tokenizer(tokenizer, tmp_path)
