# SPDX-License-Identifier: Apache-2.0
"""Several records in one row, each apart from the others: less padding, the same loss and gradients.

Positions begin again with each record. transformers reads from them, where there is no attention mask,
which tokens belong together, and makes attention block-diagonal (on a GPU by kernels that know of records:
`pyfast.train.attention`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyfast.errors import UnsupportedError
from pyfast.integrations import varlen_attention
from pyfast.nn.prompt import VirtualTokens
from pyfast.train.attention import choose_attention
from pyfast.train.data import IGNORED, Batch, Example
from pyfast.train.metrics import say
from pyfast.train.model import Place, evaluating

_FIX = "Fix: --dataset.packing false"
_TRIAL_RECORDS = 7
# Of each of them.
_TRIAL_TOKENS = 12
# Difference of logits, as a share of the largest logit, that is put down to rounding.
_ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 1e-2}


def fill_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put records into rows of at most `capacity` tokens, the longest first, each where it first fits.

    Returns:
        The indices of the records of each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(capacity, lengths[index]))
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def collate_packed(items: list[Example], capacity: int, pad_id: int, device: torch.device) -> Batch:
    """Lay examples end to end; each token of padding, at position 0, is a record of its own.

    Returns:
        `input_ids`, `position_ids` and `labels`, each int64 [rows, longest row]; no mask.
    """
    lengths = [len(item.tokens) for item in items]
    rows = fill_rows(lengths, capacity)
    shape = (len(rows), max(sum(lengths[index] for index in row) for row in rows))
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            ids = torch.from_numpy(items[index].tokens.astype(np.int64))
            learned = torch.from_numpy(items[index].learned)
            place = slice(start, start + len(ids))
            tokens[number, place] = ids
            positions[number, place] = torch.arange(len(ids))
            labels[number, place] = torch.where(learned, ids, IGNORED)
            start += len(ids)
    batch = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def row_capacity(model: Any, max_length: int) -> int:
    """Tokens of a row. No limit where records must be in one row (flash-attn's varlen, virtual tokens), or
    gain by it: torch's varlen kernels make as little of a long row as of several, and one has no padding."""
    attention = str(getattr(model.config, "_attn_implementation", ""))
    one_row = attention.startswith(("flash", varlen_attention.NAME))
    prompts = any(isinstance(module, VirtualTokens) for module in model.modules())
    return 2**62 if one_row or prompts else max_length


def prepare_packing(model: Any, items: list[Example], place: Place) -> None:
    """Give a model the best attention for packed records that computes each as it is computed alone.

    Raises:
        UnsupportedError: There is none; with the reason.
    """
    _check_kind(model)
    former = _attention_of_configs(model)
    for chosen in choose_attention(model, place):
        trial = varlen_attention.TRIAL if chosen == varlen_attention.NAME else chosen
        try:
            model.set_attn_implementation(trial)
            check_records(model, items, place.dtype)
            _run_backward(model, items, place.dtype)
            model.set_attn_implementation(chosen)
            return
        except Exception as error:  # kernels and their libraries raise anything
            for config, name in former:
                config._attn_implementation = name
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            say(f"Packing: {chosen} does not serve {type(model).__name__}: {reason}")
    check_records(model, items, place.dtype)


def _attention_of_configs(model: Any) -> list[tuple[Any, str | None]]:
    """All configs of a model and their attention, parts behind their wholes: a whole sets its parts' too."""
    from transformers import PreTrainedConfig

    held = (getattr(module, "config", None) for module in model.modules())
    configs = list({id(each): each for each in held if isinstance(each, PreTrainedConfig)}.values())
    for config in configs:  # grows on the way
        parts = (getattr(config, name, None) for name in config.sub_configs)
        configs += [part for part in parts if isinstance(part, PreTrainedConfig)]
    return [(config, config._attn_implementation) for config in configs]


def _check_kind(model: Any) -> None:
    """Refuse models that no attention helps."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"dataset.packing is true, but {name} is an encoder-decoder: its cross-attention has no form "
            f"for packed records. {_FIX}"
        )
    if model.config.model_type == "recurrent_gemma":
        raise UnsupportedError(
            f"dataset.packing is true, but in {name} the recurrent scan and the convolution run along the "
            f"whole row, so a record would see those before it. {_FIX}"
        )


def check_records(model: Any, items: list[Example], dtype: torch.dtype) -> None:
    """Refuse a model that does not compute packed records as it computes each alone.

    Args:
        model: A decoder.
        items: The training records; some of them are tried.
        dtype: What is computed in, under autocast where it is not the weights' own.

    Raises:
        UnsupportedError: With the reason.
    """
    off = _difference(model, items, dtype)
    if not off <= _ROUNDING.get(dtype, 1e-3):
        raise UnsupportedError(
            f"dataset.packing is true, but {type(model).__name__} computes packed records otherwise than "
            f"each alone (logits differ by {off:.1%} of the largest). {_FIX}"
        )


def _difference(model: Any, items: list[Example], dtype: torch.dtype) -> float:
    """How far logits of packed records are from those of each alone, as a share of the largest.

    The largest difference of any place in a record, where a place has the middle one of all records behind
    the first: a leak shows in each, if only in its first tokens; rounding that sends a token to another
    expert shows in few. Places that only the longest records have do not count.
    """
    parts, positions = _trial(model, items)
    with evaluating(model), _casting(model, dtype):
        alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in parts])
        both = torch.cat(parts, dim=1)
        packed = model(input_ids=both, position_ids=positions, use_cache=False).logits[0]
    off = (packed - alone).abs().amax(dim=-1).float().cpu()
    records = off.split([part.shape[1] for part in parts])[1:]
    places = [
        torch.stack([each[place] for each in records if place < len(each)]).median()
        for place in range(sorted(map(len, records))[len(records) // 3])
    ]
    return float(torch.stack(places).max()) / float(alone.abs().max())


def _run_backward(model: Any, items: list[Example], dtype: torch.dtype) -> None:
    """Run packed records backwards, to the embeddings of their tokens; no parameter gets a gradient."""
    leaves: list[torch.Tensor] = []

    def cut(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    parts, positions = _trial(model, items)
    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with evaluating(model), torch.enable_grad(), _casting(model, dtype):
            both = torch.cat(parts, dim=1)
            logits = model(input_ids=both, position_ids=positions, use_cache=False).logits
            torch.autograd.grad(logits.float().sum(), leaves, allow_unused=True)
    finally:
        hook.remove()


def _trial(model: Any, items: list[Example]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The beginnings of some records, each [1, T], and their positions in one row [1, sum of T]."""
    device = model.get_input_embeddings().weight.device
    parts = [
        torch.from_numpy(items[index].tokens[:_TRIAL_TOKENS].astype(np.int64))[None].to(device)
        for index in np.linspace(0, len(items) - 1, _TRIAL_RECORDS).astype(int)
    ]
    return parts, torch.cat([torch.arange(part.shape[1], device=device) for part in parts])[None]


def _casting(model: Any, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype` where the weights have another."""
    weight = model.get_input_embeddings().weight
    return torch.autocast(weight.device.type, dtype, enabled=dtype != weight.dtype)
