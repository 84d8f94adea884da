# SPDX-License-Identifier: Apache-2.0
"""Records packed into rows, and the same records each in a forward pass of its own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pyfast.train.data import Example
from pyfast.train.forms import Record
from pyfast.train.packing import collate_packed

RECORD = Record.pair("p", "c", "f", 1)


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Random tokens; the second half of each record is learned, but for one that is learned whole."""
    draw = np.random.default_rng(seed)
    items = []
    for length in lengths:
        learned = np.arange(length) >= (1 if length == max(lengths) else -(-length // 2))
        items.append(Example(draw.integers(3, 96, length).astype(np.int32), learned, RECORD))
    return items


def alone(model: Any, items: list[Example]) -> torch.Tensor:
    """Oracle: each record in a forward pass of its own, without mask and positions."""
    losses = []
    for item in items:
        ids = torch.from_numpy(item.tokens.astype(np.int64)).to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        chosen = torch.from_numpy(item.learned[1:]).to(model.device)
        losses.append(F.cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum"))
    return torch.stack(losses).sum()


def packed(model: Any, items: list[Example], capacity: int) -> torch.Tensor:
    batch = collate_packed(items, capacity, 0, model.device)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def compare(model: Any, items: list[Example], capacity: int, tolerance: float) -> None:
    """Loss and gradients; differences are told from rounding by the largest gradients."""
    expected, found = alone(model, items), packed(model, items, capacity)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=0)
    left, right = gradients(model, found), gradients(model, expected)
    assert left.keys() == right.keys()
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    for key, gradient in right.items():
        limit = tolerance * max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((left[key] - gradient).abs().max()) <= limit, key


def looped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's `varlen_attn` computes, record by record in float64."""
    assert bounds.dtype == torch.int32
    assert torch.equal(bounds, key_bounds)
    assert longest == longest_key == int(bounds.diff().max())
    assert bounds[0] == 0
    assert bounds[-1] == len(query) == len(key) == len(value)
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    repeats = query.shape[1] // key.shape[1]
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (each[start:end].double().transpose(0, 1) for each in (query, key, value))
        k, v = (each.repeat_interleave(repeats, dim=0) for each in (k, v))
        score = q @ k.mT * (scale or q.shape[-1] ** -0.5)
        place = torch.arange(end - start)
        distance = place[:, None] - place[None]
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        parts.append((score.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts).to(query.dtype)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
