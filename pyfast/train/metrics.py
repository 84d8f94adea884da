# SPDX-License-Identifier: Apache-2.0
"""What a run shows and records: progress bar, metrics.jsonl, TensorBoard, the loss curve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


def say(text: str = "") -> None:
    """Write a line for the user, above a running progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Metrics:
    """Shows and records the metrics of a run; a context manager.

    Args:
        directory: The run's directory.
        total: Number of optimiser steps of the whole run.
        done: Steps already made; records of later steps, left by a killed run, are dropped.
        log_every: Steps between lines where standard output or error is no terminal.
    """

    def __init__(self, directory: Path, total: int, done: int, log_every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = directory / "metrics.jsonl"
        self._log_every = log_every
        self._total = total
        kept = [row for row in read_metrics(self._file) if row["step"] <= done]
        self._file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._stream = self._file.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(directory / "tensorboard"), purge_step=done + 1 if done else None
        )
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=None)
        self._seconds: list[float] = []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._stream.close()
        self._board.close()

    def train(self, step: int, values: dict[str, float]) -> None:
        """Record one optimiser step; `values` holds loss, lr, grad_norm, tokens_per_second and seconds."""
        if not self._seconds:
            self._bar.unpause()  # what came before the first step says nothing about the time left
        self._seconds.append(values["seconds"])
        self._write({"step": step, **values}, "train")
        shown = f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        # Without a bar; or its terminal is not where the lines go (`pyfast finetune > log`).
        lines = self._bar.disable or not sys.stdout.isatty()
        if lines and (step % self._log_every == 0 or step in (1, self._total)):
            left = sum(self._seconds) / len(self._seconds) * (self._total - step)
            minutes, seconds = divmod(round(left), 60)
            say(f"step {step}/{self._total}: {shown}, {minutes}:{seconds:02d} left")

    def evaluation(self, step: int, loss: float, match: float | None = None) -> None:
        """Record the held-out loss after `step` steps, and the percentage of exact matches where it was
        asked for."""
        found = {} if match is None else {"eval_exact_match": match}
        self._write({"step": step, "eval_loss": loss, **found}, "eval")
        shown = "" if match is None else f", exact match {match:.1f} %"
        say(f"step {step}/{self._total}: held-out loss {loss:.4f}{shown}")

    def _write(self, row: dict[str, float], group: str) -> None:
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"{group}/{name}", value, int(row["step"]))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a kill is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(metrics: Path, target: Path, title: str) -> None:
    """Draw the training loss (each step and smoothed) and the held-out loss as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
        axes.plot(steps, _smooth(losses), color="#08519c", linewidth=2, label="training, smoothed")
    if held:
        steps, losses = zip(*held, strict=True)
        axes.plot(steps, losses, "o-", color="#d94801", linewidth=2, markersize=5, label="held out")
        for index in {0, len(held) - 1}:
            axes.annotate(
                f"{losses[index]:.2f}", held[index], textcoords="offset points", xytext=(0, 8), ha="center",
                color="#d94801", fontweight="bold",
            )  # fmt: skip
    axes.set(xlabel="optimiser step", ylabel="loss per answer token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03, y=0.12)
    axes.legend(frameon=False)
    figure.savefig(target)


def _smooth(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    """Exponential mean, without the pull towards its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
