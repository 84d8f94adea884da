# SPDX-License-Identifier: Apache-2.0
"""Every cell of the matrix once more on a GPU, in bfloat16: the same losses as the reference on the CPU."""

import pytest
import torch

from pyfast import ops
from tests.matrix.test_matrix import cells, pair, steps
from tests.matrix.test_matrix import pytestmark as on_cpu

pytestmark = [
    *on_cpu,
    pytest.mark.gpu,
    # torch 2.11 about transformers' GPT-BigCode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@cells()
def test_losses_in_bfloat16_are_near_the_oracles(name, method):
    ours, theirs = pair(method, name)
    expected = steps(theirs)
    ours.to("cuda", torch.bfloat16)
    with ops.recorded_kernels() as ran:
        got = steps(ours)
    assert got[-1] < got[0]
    # Each step moves weights by their learning rate, whatever a gradient's rounding.
    torch.testing.assert_close(got[:2], expected[:2], rtol=0.02, atol=0.02)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    if method.trains("q_proj.lora_A.default.weight") and not method.trains("q_proj.weight"):
        names = {kernel for op, kernel in ran if op.startswith("lora_")}
        assert names
        assert "reference" not in names
