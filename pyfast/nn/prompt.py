# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens: learned embeddings in front of what a model reads (P-tuning; Liu et al., 2021).

Hooks on the model's forward put them there, so that callers go on counting their own tokens alone: masks,
positions and labels are extended, and logits (or last hidden states) come back for the caller's tokens. PEFT
returns rows for virtual tokens too, learns each row's first token as well, and drops positions. Hidden states
and attentions, where asked for, have the virtual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyfast.errors import UnsupportedError
from pyfast.nn.prompt_input import (
    check_positions,
    embedded,
    extended,
    flat_mask,
    go_on,
    packed,
    put_in,
    tokens_given,
)
from pyfast.nn.switchable import Attachment

_EMBEDDINGS = "prompt_embeddings"
# Arguments whose meaning for virtual tokens is not known, or that say what the extended positions say.
_REFUSED = ("token_type_ids", "shift_labels", "cu_seq_lens_q", "cu_seq_lens_k", "packed_seq_params")


class PromptEncoder(nn.Module):
    """Embeddings of virtual tokens [V, H] through a small network; names and shapes are PEFT's.

    Args:
        kind: "MLP" (linear, ReLU, linear, ReLU, linear), "LSTM" (bidirectional LSTM, linear, ReLU, linear),
            or NeMo's "NEMO" (embeddings of the hidden size, linear, GELU, linear).
        tokens: V, with those of further parts of the model that read a prompt.
        width: H.
        hidden: size inside the network.
        layers, dropout: of the LSTM.
        device: where the parameters lie; they are float32.
    """

    def __init__(
        self,
        kind: str,
        tokens: int,
        width: int,
        hidden: int,
        layers: int,
        dropout: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        where: Any = {"device": device, "dtype": torch.float32}
        self.embedding = nn.Embedding(tokens, hidden if kind == "NEMO" else width, **where)
        if kind == "LSTM":
            self.lstm_head: nn.Module | None = nn.LSTM(
                width,
                hidden,
                layers,
                dropout=dropout,
                bidirectional=True,
                batch_first=True,
                **where,
            )
            inner = [nn.Linear(2 * hidden, 2 * hidden, **where), nn.ReLU()]
            self.mlp_head = nn.Sequential(*inner, nn.Linear(2 * hidden, width, **where))
            return
        self.lstm_head = None
        if kind == "NEMO":
            first, last = nn.Linear(hidden, hidden, **where), nn.Linear(hidden, width, **where)
            for linear in (first, last):
                nn.init.normal_(linear.weight, std=0.023)
                nn.init.zeros_(linear.bias)
            self.mlp_head = nn.Sequential(first, nn.GELU(), last)
        else:
            first, middle = nn.Linear(width, hidden, **where), nn.Linear(hidden, hidden, **where)
            last = nn.Linear(hidden, width, **where)
            self.mlp_head = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)

    def forward(self) -> Tensor:
        """[V, H]."""
        x: Tensor = self.embedding.weight
        if self.lstm_head is not None:
            x = self.lstm_head(x[None])[0][0]
        y: Tensor = self.mlp_head(x)
        return y


class PromptTable(nn.Module):
    """Embeddings of virtual tokens [V, H] as they are, from a file without an encoder."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        tokens, width = embeddings.shape
        self.embedding = nn.Embedding(tokens, width, _weight=embeddings, _freeze=True)

    def forward(self) -> Tensor:
        """[V, H]."""
        table: Tensor = self.embedding.weight
        return table


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held: Any = model._modules[VirtualTokens.child]
    return held.extend(model, args, kwargs)


def _after(model: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    held: Any = model._modules[VirtualTokens.child]
    return held.cut(kwargs, output)


class VirtualTokens(Attachment):
    """The prompt encoders of a model, its child by PEFT's name; several active ones follow one another."""

    child = "prompt_encoder"
    no_merge = "it consists of virtual tokens in the model's input"

    def __init__(self) -> None:
        super().__init__()
        self.lengths: dict[str, int] = {}
        """Virtual tokens of each adapter in one input."""
        self.in_decoder: set[str] = set()
        """Those that have as many more in front of the decoder's input."""
        self.names: tuple[str, ...] = ()
        self.two_parts = False
        self.rows: int | None = None
        """Of the model's learned table of positions, if it has one."""

    def hook(self, owner: nn.Module) -> list[RemovableHandle]:
        self.names = tuple(inspect.signature(owner.forward).parameters)
        self.two_parts = bool(getattr(getattr(owner, "config", None), "is_encoder_decoder", False))
        self.rows = position_rows(owner)
        handles = [
            owner.register_forward_pre_hook(_before, with_kwargs=True),
            owner.register_forward_hook(_after, with_kwargs=True),
        ]
        if self.two_parts:  # `generate` calls the encoder alone
            encoder: nn.Module = owner.get_encoder()  # type: ignore[operator]
            decoder: nn.Module = owner.get_decoder()  # type: ignore[operator]
            handles += [
                encoder.register_forward_pre_hook(self.extend_encoder, with_kwargs=True),
                decoder.register_forward_pre_hook(self.extend_decoder, with_kwargs=True),
                decoder.register_forward_hook(self.cut_decoder, with_kwargs=True),
            ]
        return handles

    def add(
        self, name: str, encoder: PromptEncoder | PromptTable, length: int, in_decoder: bool
    ) -> None:
        """Add an adapter, or exchange the encoder of one."""
        self.add_module(name, encoder)
        self.lengths[name] = length
        if in_decoder:
            self.in_decoder.add(name)

    def adapter_names(self) -> list[str]:
        return list(self._modules)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        if name in self._modules:
            yield from self.get_submodule(name).named_parameters()

    def remove(self, name: str) -> None:
        super().remove(name)
        self._modules.pop(name, None)
        self.lengths.pop(name, None)
        self.in_decoder.discard(name)

    def embeddings(self, name: str) -> Tensor:
        """[V, H] of one adapter."""
        out: Tensor = self.get_submodule(name)()
        return out

    def fill(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Values of the encoder by its own keys; without them the virtual tokens stay as they are given."""
        own = {key: values[key] for key, _ in self.adapter_tensors(name) if key in values}
        for key, parameter in self.adapter_tensors(name):
            if own:
                parameter.copy_(own[key])
        if not own:
            given = values[_EMBEDDINGS]
            device = next(self.get_submodule(name).parameters()).device
            table = PromptTable(given.to(device, torch.float32))
            self.add(name, table, self.lengths[name], name in self.in_decoder)

    def _taking_part(self, part: int) -> list[str]:
        """Adapters with tokens in the first input of the model (0), or in the decoder's (1)."""
        names = self.active if self.enabled else []
        return [name for name in names if part == 0 or name in self.in_decoder]

    def prompt(self, part: int) -> Tensor:
        """[V, H] of all adapters with tokens in an input."""
        found = []
        for name in self._taking_part(part):
            size = self.lengths[name]
            found.append(self.embeddings(name)[part * size : (part + 1) * size])
        return torch.cat(found)

    def length(self, part: int) -> int:
        """V of all adapters with tokens in an input."""
        return sum(self.lengths[name] for name in self._taking_part(part))

    def extend(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """The model's arguments with virtual tokens, all by name; None where there are none.

        `input_ids` is a key afterwards, with the value None, exactly if virtual tokens were put in.
        """
        if not self.length(0):
            return None
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if (
            self.two_parts
        ):  # the encoder extends its own input, the decoder's cross-attention reads this mask
            mask = flat_mask(given)
            if mask is not None:
                given["attention_mask"] = extended(mask, self.length(0))
        else:
            self._extend_stack(model, given, 0)
        return (), given

    def extend_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """A decoder's arguments with virtual tokens of its own; None where there are none."""
        if not self.length(1):
            return None
        names = inspect.signature(decoder.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        self._extend_stack(decoder, given, 1)
        return (), given

    def _extend_stack(self, module: nn.Module, given: dict[str, Any], part: int) -> None:
        """Arguments of what reads tokens and a cache of earlier ones."""
        for name in _REFUSED:
            if given.get(name) is not None:
                raise UnsupportedError(
                    f"P-tuning: {name} is not served with virtual tokens; leave it out (samples that are "
                    "packed into one row are told by their position_ids)"
                )
        given.pop("cache_position", None)  # follows from the cache
        cache = given.get("cache", given.get("past_key_values"))
        if getattr(cache, "is_compileable", False):
            raise UnsupportedError(
                "P-tuning: a static cache has no room for virtual tokens; use cache_implementation='dynamic'"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        virtual = self.length(part)
        own = tokens_given(given) + (past - virtual if past else 0)
        check_positions(module, given, own, virtual, self.rows)
        if past:
            go_on(given, past, virtual)
        else:
            put_in(given, embedded(module, given), self.prompt(part))

    def extend_encoder(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """An encoder's arguments with virtual tokens; its mask may have them already."""
        if not self.length(0):
            return None
        names = inspect.signature(encoder.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        check_positions(encoder, given, tokens_given(given), self.length(0), self.rows)
        prompt = self.prompt(0)
        embeds, mask = embedded(encoder, given), flat_mask(given)
        put_in(given, embeds, prompt)
        if mask is not None and mask.shape[1] == embeds.shape[1] + len(prompt):
            given["attention_mask"] = mask
        return (), given

    def cut(self, kwargs: dict[str, Any], output: Any) -> Any:
        """A model's output without what belongs to virtual tokens."""
        return None if self.two_parts else self._cut(kwargs, output, 0)

    def cut_decoder(
        self, decoder: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """A decoder's output without what belongs to virtual tokens of its own."""
        return self._cut(kwargs, output, 1)

    def _cut(self, kwargs: dict[str, Any], output: Any, part: int) -> Any:
        virtual = self.length(part)
        if not virtual or kwargs.get("input_ids", 0) is not None:
            return None
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor) or keep:
            return None  # these are rows of the caller's tokens already
        rows = kwargs["inputs_embeds"].shape[1]
        kept: slice | Tensor = slice(virtual, None)
        positions = kwargs.get("position_ids")
        if positions is not None and packed(kwargs.get("attention_mask"), positions):
            kept = (positions[0] >= virtual).nonzero()[:, 0]

        def tokens(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == rows
            return value[:, kept] if whole else value

        if isinstance(output, tuple):
            at = 1 if kwargs.get("labels") is not None else 0
            return tuple(tokens(v) if i == at else v for i, v in enumerate(output))
        for name in ("logits", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                setattr(output, name, tokens(getattr(output, name)))
        return output


def position_rows(model: nn.Module) -> int | None:
    """Length of a model's learned table of positions; None where it has none."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    get = getattr(model, "get_input_embeddings", None)
    words = get() if callable(get) else None
    # A prompt's own table may happen to be as long.
    prompts = (part for part in model.modules() if isinstance(part, VirtualTokens))
    passed = {words, *(module for prompt in prompts for module in prompt.modules())}
    sizes = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module not in passed
    ]
    # Some tables have up to two rows before that of the first position.
    if positions and any(positions <= size <= positions + 2 for size in sizes):
        return int(positions)
    return None
