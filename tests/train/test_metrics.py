# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it trains: a bar on a terminal, lines where one of the streams is a file."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from pyfast.train.metrics import Metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO, Terminal])
@pytest.mark.parametrize("err", [io.StringIO, Terminal])
def test_lines_where_a_stream_is_no_terminal(
    out: type[io.StringIO], err: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout, stderr = out(), err()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    values = {"loss": 2.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 5.0, "seconds": 1.0}
    with Metrics(tmp_path, total=7, done=0, log_every=3) as metrics:
        for step in range(1, 8):
            metrics.train(step, values)
    shown = [line.partition(":")[0] for line in stdout.getvalue().splitlines()]
    lines = [f"step {step}/7" for step in (1, 3, 6, 7)]
    assert shown == ([] if (out, err) == (Terminal, Terminal) else lines)
    assert ("7/7" in stderr.getvalue()) == (err is Terminal)
