# SPDX-License-Identifier: Apache-2.0
"""Records packed into rows, and the same records each in a forward pass of its own."""

from __future__ import annotations

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


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
