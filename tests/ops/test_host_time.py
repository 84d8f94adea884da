# SPDX-License-Identifier: Apache-2.0
"""What an eager LoRA linear costs on the host, where small batches are decided."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from pyfast import ops
from pyfast.testing import seeded

pytestmark = pytest.mark.gpu

MOST = 2.5
"""Forward and backward, in those of the frozen layer."""


def host_seconds(step, steps=50):
    """Until everything is enqueued; the work itself is small enough for the device to keep up."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward_in_terms_of_the_frozen_layer(adapter):
    rows, n, k, r = 64, 256, 256, 8
    x = seeded((rows, k), seed=1, dtype=torch.bfloat16, device="cuda").requires_grad_()
    w = seeded((n, k), seed=2, dtype=torch.bfloat16, device="cuda")
    a, b = (
        seeded(shape, seed=3, dtype=adapter, device="cuda").requires_grad_()
        for shape in ((r, k), (n, r))
    )
    dy = seeded((rows, n), seed=4, dtype=torch.bfloat16, device="cuda")

    def frozen():
        x.grad = None
        torch.nn.functional.linear(x, w).backward(dy)

    def adapted():
        x.grad = a.grad = b.grad = None
        ops.lora_linear(x, w, a, b, scale=1.0).backward(dy)

    for step in (frozen, adapted):
        host_seconds(step)
    rounds = [(host_seconds(frozen), host_seconds(adapted)) for _ in range(21)]
    base, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
    assert ours <= MOST * base, f"{ours * 1e6:.0f} us, the frozen layer {base * 1e6:.0f} us"
