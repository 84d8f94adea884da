# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, prepared, run, timing

CPU = torch.device("cpu")
needs_peft = pytest.mark.skipif(
    prepared.importlib.util.find_spec("peft") is None, reason="PEFT is not installed"
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, and few copies."""
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "BURST_SECONDS", 0.0)
    monkeypatch.setattr(run, "MAX_COPIES", 2)


def rows_of(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a run on the CPU, none of them wrong."""
    out = tmp_path / "out.json"
    assert run.main(["--device", "cpu", "--seconds", "0", "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def tiny(name: str) -> cases.Case:
    """The one tiny case that a glob names."""
    (case,) = cases.select("cpu", f"tiny/{name}")
    return case
