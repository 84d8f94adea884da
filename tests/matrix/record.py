# SPDX-License-Identifier: Apache-2.0
"""The record of a GPU run of the matrix: a row for each cell that passed.

PYFAST_MATRIX_RECORD=benchmarks/results/h100_matrix.json pytest -m gpu tests/matrix/test_matrix_cuda.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine

VARIABLE = "PYFAST_MATRIX_RECORD"
COMMITTED = machine.ROOT / "benchmarks" / "results" / "h100_matrix.json"


class Record:
    """Rows, which end up in the file that the variable names, if it names one."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, name: str, method: str, losses: Any, oracle: Any, ran: Any) -> None:
        """A cell: its losses in bfloat16 on the GPU, those of the reference in float32 on the CPU, and which
        kernels served our ops."""
        kernels = sorted({f"{op}: {kernel}" for op, kernel in ran})
        self._rows.append(
            {
                "model": name,
                "method": method,
                "losses": [round(loss, 4) for loss in losses.tolist()],
                "oracle": [round(loss, 4) for loss in oracle.tolist()],
                "kernels": kernels,
            }
        )

    def write(self) -> None:
        """Where it ran goes ahead of the cells."""
        path = os.environ.get(VARIABLE)
        if not path:
            return
        device = torch.device("cuda")
        head = {
            "schema": "pyfast-matrix/1",
            "device": machine.device_name(device),
            "driver": machine.driver_version(device),
            **machine.versions(),
            "trees": machine.trees(),
            "dtype": "bfloat16",
        }
        lines = ",\n".join(json.dumps(row) for row in (head, *self._rows))
        Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
