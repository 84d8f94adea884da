# SPDX-License-Identifier: Apache-2.0
"""Attention of packed records by torch's varlen kernels, for transformers under the name "pyfast_varlen".

Packed records attend each to itself. transformers says so to SDPA with a mask [B, 1, T, T], which is large
and keeps SDPA from its flash kernels. Here the mask is only described: attention reads from it where the
records begin, and runs over their tokens alone. Whatever the kernels do not serve (a mask of the caller's, a
cache, dropout, float32, a CPU) gets the very mask that SDPA would get, and goes to SDPA.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from pyfast.errors import UnsupportedError

NAME = "pyfast_varlen"
"""What `model.set_attn_implementation` is given after `register`."""
TRIAL = "pyfast_varlen_trial"
"""The same, but packed rows that the kernels do not serve raise `UnsupportedError`."""

# What the kernels take: elements of a head, dtypes.
_LARGEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16)
# torch 2.11 takes fewer heads of keys than of queries as they are.
_OPTIONS = inspect.signature(varlen_attn).parameters
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}
# What other attention functions of transformers can do, and the kernels cannot.
_NOT_SERVED = ("softcap", "position_bias", "s_aux", "sinks")
# Which keys are attended to: told to SDPA by the mask, to all others by these.
_CHOSEN_KEYS = ("indices", "block_indices")


def register() -> None:
    """Make transformers know the names."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, mask in ((NAME, packed_mask), (TRIAL, _trial_mask)):
        AttentionInterface.register(name, varlen_attention)
        AttentionMaskInterface.register(name, mask)


def has_kernels(device: torch.device) -> bool:
    """Whether torch has varlen kernels for a device."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_mask(**given: Any) -> Tensor | PackedMask | None:
    """transformers' mask function: `sdpa_mask`, but for packed rows their description.

    They have neither padding mask nor cache, and may not be taken for plain causal rows.
    """
    from transformers.masking_utils import sdpa_mask

    whole = given["q_length"] == given["kv_length"] and given.get("attention_mask") is None
    whole = whole and not given.get("q_offset") and not given.get("kv_offset")
    plain = given.get("allow_is_causal_skip", True) or given.get("allow_is_bidirectional_skip")
    if not whole or plain or given.get("use_vmap"):  # the last: a function of the model's own
        return sdpa_mask(**given)
    return PackedMask(given)


def _trial_mask(**given: Any) -> Tensor | PackedMask | None:
    mask = packed_mask(**given)
    return _KernelsAlone(given) if isinstance(mask, PackedMask) else mask


@dataclass(frozen=True)
class Records:
    """The records of a packed batch, as the kernels want them.

    Attributes:
        bounds: int32 [N + 1], where each begins among the tokens [B * T], and the end.
        longest: Tokens of the longest.
    """

    bounds: Tensor
    longest: int


class PackedMask:
    """The mask of packed rows; all layers of a forward pass share it, and what was read from it once.

    Args:
        given: The arguments of `sdpa_mask`.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    @cached_property
    def dense(self) -> Tensor | None:
        """What `sdpa_mask` returns, bool [B, 1, T, T]."""
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(**self._given)

    @property
    def window(self) -> tuple[int, int]:
        """How many tokens before (-1: all) and after itself a token attends to."""
        size = self._given.get("local_size")
        return (-1 if size is None else size - 1, 0)

    @cached_property
    def records(self) -> Records | None:
        """The records; None where tokens attend to later ones too. Waits for the device, once.

        A record's tokens lie side by side, so it begins where a token does not attend to its neighbour.
        """
        given = self._given
        rows, length, device = given["batch_size"], given["q_length"], given["device"]
        attends = given["mask_function"]
        row = torch.arange(rows, device=device)[:, None]
        token = torch.arange(1, length, device=device)[None]
        pairs = [(token, token - 1), (token - 1, token)]
        found = [attends(row, torch.zeros_like(row), *pair) for pair in pairs]
        before, after = torch.stack([each.expand(rows, length - 1) for each in found]).cpu()
        if after.any():
            return None
        begins = torch.ones(rows, length, dtype=torch.bool)
        begins[:, 1:] = ~before
        end = torch.tensor([rows * length])
        bounds = torch.cat([begins.flatten().nonzero()[:, 0], end]).int()
        return Records(bounds.to(device), int(bounds.diff().max()))


class _KernelsAlone(PackedMask):
    """A mask that SDPA does not get."""

    @cached_property
    def dense(self) -> Tensor | None:
        raise UnsupportedError("torch's varlen kernels do not take what its attention computes")


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: softmax(scaling q k^T, within records) v, or else SDPA's.

    Args:
        module: The layer.
        query: [B, heads, T, D].
        key: [B, key heads, T, D].
        value: As `key`.
        attention_mask: From `packed_mask`.
        dropout: Of the attention weights.
        scaling: By default 1 / sqrt(D).
        others: What else layers tell; whatever of it the kernels do not serve goes to SDPA.

    Returns:
        [B, T, heads, D], and no weights.

    Raises:
        UnsupportedError: The layer attends to keys of its own choice.
    """
    if any(others.get(name) is not None for name in _CHOSEN_KEYS):
        raise UnsupportedError(
            f"{type(module).__name__} attends to keys of its own choice, which {NAME} does not serve. "
            "Fix: --dataset.packing false, or another attention implementation"
        )
    if isinstance(attention_mask, PackedMask):
        mask, tensors = attention_mask, _under_autocast(query, key, value)
        unserved = dropout or any(others.get(name) is not None for name in _NOT_SERVED)
        if not unserved and _served(*tensors) and (records := mask.records) is not None:
            q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in tensors)
            bounds = records.bounds.to(q.device)
            lengths = (bounds, bounds, records.longest, records.longest)
            out: Any = varlen_attn(
                q, k, v, *lengths, scale=scaling, window_size=mask.window, **_GROUPED
            )
            return out.unflatten(0, (query.shape[0], query.shape[2])), None
        attention_mask = mask.dense
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast has SDPA compute in; the varlen kernels are unknown to it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(each.to(dtype) if each.dtype == torch.float32 else each for each in tensors)


def _served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    head = query.shape[-1]
    return (
        has_kernels(query.device)
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and head == value.shape[-1] <= _LARGEST_HEAD
        and head % 8 == 0
        and query.shape[2] == key.shape[2]
    )
