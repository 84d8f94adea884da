# SPDX-License-Identifier: Apache-2.0
"""Runs killed in the middle of anything: what is on disk is always usable, and the end is the same."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyfast.train import FinetuneConfig, finetune
from pyfast.train import checkpoint as ckpt
from pyfast.train.command import program

# Children are forked from a server that has imported everything, so that a start costs little.
_CONTEXT = multiprocessing.get_context("forkserver")


def _train(config: FinetuneConfig, log: str) -> None:
    """A child process: resume if there is something to resume."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    config.resume = ckpt.read_latest(Path(str(config.output_dir)) / "checkpoints") is not None
    try:
        finetune(config)
    except KeyboardInterrupt:
        os._exit(130)


def start(config: FinetuneConfig, tmp_path: Path) -> Any:
    _CONTEXT.set_forkserver_preload(["pyfast.train", "datasets", "transformers.models.llama"])
    child = _CONTEXT.Process(target=_train, args=(config, str(tmp_path / "log")))
    child.start()
    return child


def same_weights(left: Path, right: Path) -> bool:
    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_times(make_config: Any, tmp_path: Path) -> None:
    kills = int(os.environ.get("PYFAST_TEST_KILLS", "8"))
    options = {"steps": 60, "save_every": 1, "eval_every": 20, "keep_last": 2}
    whole = start(make_config(**options, output_dir=str(tmp_path / "whole")), tmp_path)
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "log").read_text()

    config = make_config(**options, output_dir=str(tmp_path / "killed"))
    checkpoints = tmp_path / "killed" / "checkpoints"
    draw = random.Random(20)
    done = finished = 0
    reached = []
    while done < kills:
        child = start(config, tmp_path)
        # Wait until this child has made a checkpoint of its own, then kill within the next few steps.
        known = ckpt.read_latest(checkpoints)
        while child.is_alive() and ckpt.read_latest(checkpoints) == known:
            child.join(0.01)
        child.join(draw.uniform(0, 0.12))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            done += 1
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        checkpoint = ckpt.load(checkpoints)  # verified in full
        reached.append(checkpoint.progress.step)
        if checkpoint.progress.step == 60:
            finished += 1
            break
    assert reached == sorted(reached)
    last = start(config, tmp_path)
    last.join()
    assert last.exitcode == 0, (tmp_path / "log").read_text()
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".tmp*"))
    names = ("step", "loss", "lr", "grad_norm", "eval_loss")
    logs = [
        [{key: row[key] for key in names if key in row} for row in rows(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    assert done >= min(kills, 4)


def rows(output: Path) -> list[dict[str, float]]:
    from pyfast.train.metrics import read_metrics

    return read_metrics(output / "metrics.jsonl")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_resume(
    make_config: Any, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    config = make_config(steps=100_000, save_every=5)
    output = Path(config.output_dir)
    child = start(config, tmp_path)
    while child.is_alive() and ckpt.read_latest(output / "checkpoints") is None:
        child.join(0.01)
    os.kill(child.pid, number)
    child.join(30)
    text = (tmp_path / "log").read_text()
    assert child.exitcode == status, text
    step = ckpt.load(output / "checkpoints").progress.step
    assert (
        f"Stopped after step {step} of 100000; saved {output}/checkpoints/step-{step:06d}." in text
    )
    assert f"  {program()} finetune --config {output}/config.yaml --resume true\n" in text
