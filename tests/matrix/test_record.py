# SPDX-License-Identifier: Apache-2.0
"""The committed record of the matrix on a GPU."""

import json

import torch

from tests.matrix.cells import all_cells, close
from tests.matrix.record import COMMITTED


def test_has_every_cell_once_and_each_is_near_its_reference():
    head, *rows = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert head["schema"] == "pyfast-matrix/1"
    assert set(head["trees"]) == {"csrc", "pyfast"}
    cells = [(row["model"], row["method"]) for row in rows]
    assert len(set(cells)) == len(cells)
    # Those of a family or a method that came after the run are not in it.
    assert set(cells) <= set(all_cells())
    assert len(cells) >= 182
    for row in rows:
        got, reference = (torch.tensor(row[key]) for key in ("losses", "oracle"))
        assert got[-1] < got[0], row
        close(got, reference, tolerance=0.1)
