# SPDX-License-Identifier: Apache-2.0
"""Every cell of the matrix once more on a GPU, in bfloat16: the same losses as the reference on the CPU."""

import pytest
import torch

from pyfast import ops
from tests.matrix.cells import MARKS, cells, close, pair, train
from tests.matrix.methods import METHODS
from tests.matrix.record import Record

pytestmark = [
    *MARKS,
    pytest.mark.gpu,
    # torch 2.11 about transformers' GPT-BigCode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def record():
    rows = Record()
    yield rows
    rows.write()


@cells()
def test_losses_in_bfloat16_are_near_the_oracles(name, method, record):
    ours, theirs = pair(method, name)
    expected = train(theirs, steps=5).losses
    ours.to("cuda", torch.bfloat16)
    with ops.recorded_kernels() as ran:
        got = train(ours, steps=5).losses
    assert got[-1] < got[0]
    # Each step moves weights by their learning rate, whatever a gradient's rounding.
    close(got[:2], expected[:2], tolerance=0.02)
    close(got, expected, tolerance=0.1)
    if method.trains("q_proj.lora_A.default.weight") and not method.trains("q_proj.weight"):
        names = {kernel for op, kernel in ran if op.startswith("lora_")}
        assert names
        assert "reference" not in names
    column = next(column for column, each in METHODS.items() if each is method)
    record.add(name, column, got, expected, ran)
