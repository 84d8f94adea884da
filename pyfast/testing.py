# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: seeded inputs and the accuracy rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded(
    shape: Sequence[int],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    scale: float = 1.0,
) -> Tensor:
    """Normal values with standard deviation `scale`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(device)


def assert_accurate(
    result: Tensor, plain: Tensor, exact: Tensor, *, what: str = "result", eps: float = 1e-5
) -> None:
    """Check a result by the one accuracy rule.

    Against the float64 answer, the rms error is at most 1.1 times and the maximum error at most twice
    that of the plain PyTorch composition in the same dtype, plus `eps` times the answer's largest value.

    Args:
        result: what the op gave.
        plain: the plain composition in the op's dtype.
        exact: the same in float64.
        what: name for the message.
        eps: slack relative to max |exact|.

    Raises:
        AssertionError: with the largest error, its place and both values.
    """
    assert result.shape == exact.shape, f"{what}: shape {result.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    exact = exact.double().cpu()
    mine = (result.double().cpu() - exact).abs()
    theirs = (plain.double().cpu() - exact).abs()
    assert torch.isfinite(mine).all(), (
        f"{what}: {int((~torch.isfinite(mine)).sum())} non-finite values"
    )
    slack = eps * exact.abs().max().item()
    rms, plain_rms = mine.square().mean().sqrt().item(), theirs.square().mean().sqrt().item()
    worst, plain_worst = mine.max().item(), theirs.max().item()
    place = torch.unravel_index(mine.argmax(), mine.shape)
    index = tuple(int(i) for i in place)
    detail = f"at {index}: got {result.double().cpu()[index]:.8g}, exact {exact[index]:.8g}"
    assert rms <= 1.1 * plain_rms + slack, (
        f"{what}: rms error {rms:.3g}, plain {plain_rms:.3g}; {detail}"
    )
    assert worst <= 2 * plain_worst + slack, (
        f"{what}: max error {worst:.3g}, plain {plain_worst:.3g}; {detail}"
    )
