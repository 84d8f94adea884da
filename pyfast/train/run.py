# SPDX-License-Identifier: Apache-2.0
"""What surrounds the loop: output directory, seeds, signals, the closing report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError

from pyfast.errors import CheckpointWriteError, ConfigError, PyfastError, ResumeError
from pyfast.train import checkpoint as ckpt
from pyfast.train import default_data
from pyfast.train.attention import attention_in_words
from pyfast.train.checkpoint import Checkpoint, Progress
from pyfast.train.command import program
from pyfast.train.config import FinetuneConfig, to_dict
from pyfast.train.data import Data
from pyfast.train.default_model import NAME
from pyfast.train.metrics import plot_losses, say
from pyfast.train.model import Place, write_weights
from pyfast.train.samples import Samples

# Settings a resumed run may change: they decide what is shown and kept, not what is learned.
_FREE = (
    *("eval_every", "save_every", "keep_last", "log_every", "samples", "device", "dtype"),
    *("predict_with_generate", "max_predict_samples", "max_new_tokens"),
)
# Methods whose adapters are no part of weights.
_UNMERGED = ("p-tuning", "adapters")


@dataclass(frozen=True)
class Result:
    """What a finished run leaves behind.

    Attributes:
        output_dir: Everything the run wrote.
        weights: The adapter's directory, or the model's under sft.
        loss_curve: The plot of the losses.
        steps: Optimiser steps made.
        eval_loss_before: Held-out loss before the first step; None without held-out records.
        eval_loss: Held-out loss after the last step.
        samples: For some held-out questions: prompt, reference, before, after.
        exact_match_before: Percentage of held-out records answered exactly before the first step; None where
            that was not asked for.
        exact_match: The same after the last step.
    """

    output_dir: Path
    weights: Path
    loss_curve: Path
    steps: int
    eval_loss_before: float | None
    eval_loss: float | None
    samples: list[dict[str, str]]
    exact_match_before: float | None = None
    exact_match: float | None = None


def check_output(config: FinetuneConfig) -> Path:
    """The directory of the run, which can be written and holds no other run; nothing is written yet.

    Raises:
        ConfigError: The directory is in use and `resume` is off, or it cannot be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    output = Path(config.output_dir or f"outputs/{_model_name(config)}-{config.method}-{stamp}")
    latest = ckpt.read_latest(output / "checkpoints")
    if latest and not config.resume:
        raise ConfigError(
            f"output_dir '{output}' already holds a run (newest checkpoint: {latest}). "
            "Fix: --resume true to go on with it, or another --output_dir."
        )
    if config.resume and not output.is_dir():
        raise ConfigError(f"output_dir '{output}' does not exist, so there is nothing to resume.")
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is no directory" if not existing.is_dir() else "is not yours to write in"
        raise ConfigError(
            f"output_dir '{output}' cannot be written: '{existing}' {reason}. "
            "Fix: another --output_dir."
        )
    return output


@contextlib.contextmanager
def writing(output: Path, start: Checkpoint | None) -> Iterator[None]:
    """Keep other runs out of a run's directory, and tell in a sentence when a disk refuses something.

    Args:
        output: The directory; it is made.
        start: The checkpoint that the run goes on from.

    Raises:
        ConfigError: Another run writes there, or has done so after `start` was read.
        CheckpointWriteError: Something could not be written.
    """
    checkpoints = output / "checkpoints"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / ".lock").open("a") as stream:  # the system drops the lock with the process
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(output, "is being written by") from None
            except OSError:  # a file system without locks
                pass
            if ckpt.read_latest(checkpoints) != (start.path.name if start else None):
                raise _in_use(output, "has just been written by")
            yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, PyfastError):
            raise
        latest = ckpt.read_latest(checkpoints)
        state = f"The checkpoint {latest} is intact" if latest else "There is no checkpoint"
        onward = resume_command(output) if latest else "start again"
        raise CheckpointWriteError(
            f"output_dir '{output}' cannot be written: {error}. {state}. "
            f"Fix: free space or allow writing there, then {onward}."
        ) from error


def _in_use(output: Path, how: str) -> ConfigError:
    return ConfigError(f"output_dir '{output}' {how} another run. Fix: another --output_dir.")


def prepare_output(config: FinetuneConfig, output: Path) -> None:
    """Make the directory of a run that was checked in full, with its config.yaml.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / "checkpoints").exists():
            ckpt.clean(output / "checkpoints")
        if not config.resume:  # a run that ended before its first checkpoint may have left these
            for stale in ("metrics.jsonl", "samples.json"):
                (output / stale).unlink(missing_ok=True)
            shutil.rmtree(output / "tensorboard", ignore_errors=True)
        values = {**to_dict(config), "resume": False}
        (output / "config.yaml").write_text(
            yaml.safe_dump(values, sort_keys=False), encoding="utf-8"
        )
        if not config.data_files:
            (output / "DATA_LICENSE.txt").write_text(default_data.LICENSE, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir '{output}' cannot be written: {error}.") from error


def _model_name(config: FinetuneConfig) -> str:
    return NAME if config.model == "default" else Path(config.model).name or "model"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resume_settings(config: FinetuneConfig, place: Place, data: Data) -> dict[str, Any]:
    """The settings that a resumed run must share with the saved one, as a flat dictionary."""
    values = to_dict(config)
    for name in ("output_dir", "resume", "data"):  # the data's content is compared instead
        del values[name]
    values["run"] = {key: value for key, value in values["run"].items() if key not in _FREE}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}.{key}": item for key, item in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return {
        **flat,
        "device": place.device.type,
        "dtype": str(place.dtype),
        "data": data.fingerprint,
    }


def describe(
    config: FinetuneConfig,
    place: Place,
    model: Any,
    parameters: dict[str, torch.nn.Parameter],
    data: Data,
    total: int,
) -> None:
    """Say what is about to be trained on what."""
    count = sum(parameter.numel() for parameter in parameters.values())
    name = f"{NAME} (the default)" if config.model == "default" else config.model
    say(f"Model: {name}, {type(model).__name__}, on {place}")
    say(f"Method: {config.method}, {count:,} trainable parameters in {len(parameters)} tensors")
    source = ", ".join(config.data_files) or f"{default_data.PACKAGE} (the default, BSD-3-Clause)"
    reading = data.reading
    say(
        f"Data: {source}, {len(reading.records):,} records, {reading.duplicates:,} duplicates dropped"
    )
    if reading.skipped:
        say(f"{len(reading.skipped):,} bad records skipped:\n{reading.describe_skipped()}")
    say(data.train.describe("  training", config.dataset.max_length))
    if len(data.evaluation):
        say(data.evaluation.describe("  held out", config.dataset.max_length))
    else:
        say("  held out: nothing")
    size = config.run.batch_size * config.run.accumulation
    packed = ", packed" if config.dataset.packing else ""
    if packed:
        say(f"Packing: records are kept apart by {attention_in_words(model, place)}")
    say(f"Run: {total:,} steps of {size} records{packed}, peak learning rate {config.peak_lr:g}\n")


class StopSignals:
    """Turns SIGINT and SIGTERM into a request to stop; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        say("\nStopping after this step, with a checkpoint. Once more stops at once.")

    def leave(self, checkpoint: Path, step: int, total: int, output: Path) -> None:
        """Say how to go on and end the run.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, with status 143.
        """
        say(
            f"\nStopped after step {step} of {total}; saved {checkpoint}. "
            f"Resume with:\n  {resume_command(output)}"
        )
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


def resume_command(output: Path) -> str:
    """The command that goes on with a stopped run."""
    return f"{program()} finetune --config {shlex.quote(str(output / 'config.yaml'))} --resume true"


def check_length(checkpoint: Checkpoint, config: FinetuneConfig, model: Any) -> None:
    """Refuse to resume a run with another length: its learning rate was scheduled over the first one.

    Raises:
        ResumeError: `steps` or `epochs` differ; the message says how to train on.
    """
    saved = checkpoint.values["settings"]
    before, now = (
        f"run.steps {steps}" if steps else f"run.epochs {epochs:g}"
        for steps, epochs in (
            (saved["run.steps"], saved["run.epochs"]),
            (config.run.steps, config.run.epochs),
        )
    )
    if before == now or saved["method"] != config.method:
        return  # another method is refused with the other settings; how to train on would be its own
    if config.method == "sft":
        onward = f"{program()} finetune --model {checkpoint.path / 'model'}"
    else:
        flags = _weights_flags(config, model, checkpoint.path / "adapter")
        onward = (
            f"{program()} merge {flags} --output MERGED, then {program()} finetune --model MERGED"
        )
    if config.method in _UNMERGED:
        onward = f"pyfast.load_adapter(model, {str(checkpoint.path / 'adapter')!r}, trainable=True)"
    raise ResumeError(
        f"checkpoint '{checkpoint.path}' belongs to a run of {before}, this asks for {now}; the learning "
        "rate is scheduled over the whole run, so its length stays as it is. "
        f"Fix: {before} again, or a new run that goes on from these weights: {onward}"
    )


def _weights_flags(config: FinetuneConfig, model: Any, weights: Path) -> str:
    """Flags of `generate` and `merge` that name the weights of a run, and the base they belong to."""
    stored = getattr(model.config, "quantization_config", None) is not None
    flags = f"{'--model' if config.method == 'sft' else '--adapter'} {shlex.quote(str(weights))}"
    if config.method == "qlora" and not stored:
        nested = str(config.quant.nested).lower()
        flags += f" --nf4 true --blocksize {config.quant.blocksize} --nested {nested}"
    return flags


def finish(
    config: FinetuneConfig,
    output: Path,
    model: Any,
    tokenizer: Any,
    progress: Progress,
    samples: Samples,
) -> Result:
    """Write weights and loss curve, and say where they lie and how to use them."""
    kind = "model" if config.method == "sft" else "adapter"
    weights = output / kind
    temporary = output / ".tmp-weights"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_weights(model, tokenizer, temporary, config.method)
        shutil.rmtree(weights, ignore_errors=True)
        (temporary / kind).rename(weights)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    curve = output / "loss_curve.png"
    plot_losses(output / "metrics.jsonl", curve, f"{_model_name(config)}, {config.method}")
    result = Result(
        output,
        weights,
        curve,
        progress.step,
        progress.eval_loss_before,
        progress.eval_loss,
        samples.rows,
        progress.exact_match_before,
        progress.exact_match,
    )
    attention = model.config._attn_implementation
    summary = {**asdict(progress), "weights": kind, "attention": attention}
    (output / "result.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    samples.show()
    say(f"\nTrained {progress.step} steps, {progress.tokens:,} tokens in {progress.seconds:.0f} s.")
    if progress.eval_loss is not None and progress.eval_loss_before is not None:
        say(
            f"Held-out loss: {progress.eval_loss_before:.4f} before, {progress.eval_loss:.4f} after."
        )
    if progress.exact_match is not None and progress.exact_match_before is not None:
        say(
            f"Exact match:   {progress.exact_match_before:.1f} % before, {progress.exact_match:.1f} % after."
        )
    say(
        f"{kind.capitalize()}:  {weights}\nLoss curve: {curve}\nTensorBoard: tensorboard --logdir {output}"
    )
    flags = _weights_flags(config, model, weights)
    say(f"\nAsk it:    {program()} generate {flags} --prompt '...'")
    if kind == "adapter" and config.method not in _UNMERGED:
        merged = shlex.quote(str(output / "merged"))
        say(f"Merge it:  {program()} merge {flags} --output {merged}")
    return result
