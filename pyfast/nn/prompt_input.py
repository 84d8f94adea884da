# SPDX-License-Identifier: Apache-2.0
"""A model's arguments with virtual tokens in them: embeddings, masks, positions, labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import UnsupportedError

IGNORED = -100


def embedded(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The embeddings [B, T, H] of the tokens that are given."""
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(given["input_ids"])  # type: ignore[operator]
    return embeds  # type: ignore[no-any-return]


def tokens_given(given: dict[str, Any]) -> int:
    """T, the tokens in a row of what is given."""
    ids = given.get("input_ids")
    return int((given["inputs_embeds"] if ids is None else ids).shape[1])


def check_positions(
    model: nn.Module, given: dict[str, Any], own: int, virtual: int, rows: int | None
) -> None:
    """Refuse more tokens than a learned table of positions has rows.

    Args:
        model: What is called.
        given: Its arguments, without virtual tokens. Positions that are given say what is needed: padding has
            none of its own, and packed samples share theirs.
        own: The caller's tokens in a row, with those in a cache.
        virtual: Virtual tokens.
        rows: Of the table; None where there is none.

    Raises:
        UnsupportedError: They are too many.
    """
    if rows is None or own + virtual <= rows:
        return
    if (positions := given.get("position_ids")) is not None:
        own = int(positions.max()) + 1
    if own + virtual > rows:
        raise UnsupportedError(
            f"P-tuning: {own} tokens and {virtual} virtual ones in front of them are {own + virtual}, but "
            f"{type(model).__name__} has {rows} positions. Fix: at most {max(0, rows - virtual)} tokens"
        )


def flat_mask(given: dict[str, Any]) -> Tensor | None:
    """The mask [B, T] that is given, or None.

    Raises:
        UnsupportedError: it is of another kind.
    """
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        kind = f"{list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"P-tuning: the attention_mask must be [batch, tokens], got {kind}")
    return mask


def go_on(given: dict[str, Any], past: int, virtual: int) -> None:
    """Arguments of a step that has virtual tokens in its cache."""
    if given.get("input_ids") is None:
        given.pop("input_ids", None)
    tokens = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    mask = flat_mask(given)
    if mask is not None:
        if mask.shape[1] + virtual != past + tokens.shape[1]:
            raise UnsupportedError(
                f"P-tuning: the attention_mask has {mask.shape[1]} columns, but the cache holds {past} "
                f"tokens ({virtual} of them virtual) and {tokens.shape[1]} come; a cache of an earlier "
                "call of generate cannot be gone on with, start without it"
            )
        given["attention_mask"] = extended(mask, virtual)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + virtual


def packed(mask: Tensor | None, positions: Tensor) -> bool:
    """Whether one row holds several samples, each of which begins with position 0."""
    if mask is not None or positions.ndim != 2 or positions.shape[0] != 1:
        return False
    return bool((positions[0, 1:] <= positions[0, :-1]).any())


def put_in(given: dict[str, Any], embeds: Tensor, prompt: Tensor) -> None:
    """Put virtual tokens in front of each row, or of each sample where rows are packed."""
    mask, positions = flat_mask(given), given.get("position_ids")
    if positions is not None and positions.ndim != 2:
        raise UnsupportedError(
            f"P-tuning: position_ids must be [batch, tokens], got {list(positions.shape)}"
        )
    spread: _Front | _Between
    if positions is not None and packed(mask, positions):
        spread = _Between(positions, len(prompt))
    else:
        spread = _Front(embeds.shape[1], len(prompt), mask)
    given["input_ids"], given["inputs_embeds"] = None, spread(embeds, prompt.to(embeds.dtype))
    if mask is not None:
        given["attention_mask"] = spread(mask, mask.new_ones(len(prompt)))
    if positions is not None:
        count = torch.arange(len(prompt), device=positions.device, dtype=positions.dtype)
        given["position_ids"] = spread(positions + len(prompt), count)
    if (labels := given.get("labels")) is not None:
        ignored = labels.new_full((len(prompt),), IGNORED)
        # The first token could be learned now, but whoever divides by the number of learned tokens, as
        # Trainer does over accumulated batches, counts without it.
        first = labels.new_full((labels.shape[0], 1), IGNORED)
        given["labels"] = spread(torch.cat([first, labels[:, 1:]], dim=1), ignored)
    if given.get("logits_to_keep") is not None:
        given["logits_to_keep"] = spread.kept(given["logits_to_keep"])


def extended(mask: Tensor, virtual: int) -> Tensor:
    """A mask [B, T] with virtual tokens."""
    return _Front(mask.shape[1], virtual, mask)(mask, mask.new_ones(virtual))


class _Front:
    """Virtual tokens in front of each row, or behind its padding: windows and recurrences count places."""

    def __init__(self, tokens: int, virtual: int, mask: Tensor | None) -> None:
        self._tokens, self._virtual = tokens, virtual
        self._order: Tensor | None = None
        if mask is not None:
            padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
            place = torch.arange(virtual + tokens, device=mask.device)
            behind = torch.where(place < padding + virtual, place - padding, place)
            self._order = torch.where(place < padding, place + virtual, behind)

    def __call__(self, values: Tensor, others: Tensor) -> Tensor:
        """Values [B, T, ...] of the tokens with those [V, ...] of the virtual ones."""
        out = torch.cat([others.expand(values.shape[0], *others.shape), values], dim=1)
        if self._order is None:
            return out
        order = self._order.view(*self._order.shape, *(1 for _ in values.shape[2:]))
        if out.shape[0] < order.shape[0]:  # one row of positions for all
            out = out.expand(order.shape[0], *out.shape[1:])
        return torch.take_along_dim(out, order.expand(*order.shape[:2], *out.shape[2:]), dim=1)

    def kept(self, keep: int | Tensor) -> int | Tensor:
        """`logits_to_keep` for the extended rows."""
        return keep + self._virtual if isinstance(keep, Tensor) else min(keep, self._tokens)


class _Between:
    """Virtual tokens in front of each sample of the one row that samples are packed into."""

    def __init__(self, positions: Tensor, virtual: int) -> None:
        breaks = positions[0, 1:] <= positions[0, :-1]
        count = torch.arange(positions.shape[1], device=positions.device)
        sample = torch.cat([breaks.new_zeros(1), breaks]).cumsum(0)
        first = torch.cat([count[:1], breaks.nonzero()[:, 0] + 1])
        self._own = count + virtual * (sample + 1)
        starts = first + virtual * torch.arange(len(first), device=positions.device)
        self._others = starts[:, None] + torch.arange(virtual, device=positions.device)

    def __call__(self, values: Tensor, others: Tensor) -> Tensor:
        """As `_Front`, with one row."""
        samples = self._others.shape[0]
        size = self._own.numel() + self._others.numel()
        out = values.new_zeros(1, size, *values.shape[2:]).index_copy(1, self._own, values)
        repeated = others.repeat(samples, *(1 for _ in others.shape[1:]))
        return out.index_copy(1, self._others.flatten(), repeated[None])

    def kept(self, keep: int | Tensor) -> int | Tensor:
        """As `_Front`."""
        if isinstance(keep, Tensor):
            return self._own[keep]
        return self._own[-keep:] if keep else 0
