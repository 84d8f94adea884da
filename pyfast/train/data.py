# SPDX-License-Identifier: Apache-2.0
"""From records to token batches: chat template, answer mask, truncation, order of training."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pyfast.errors import DataError, EmptyTargetError
from pyfast.train.config import FinetuneConfig
from pyfast.train.default_data import default_records
from pyfast.train.forms import Record
from pyfast.train.records import Reading, read_records, split_records, without_leakage

IGNORED = -100
# Steps' worth of records that are sorted by length together, to spend less on padding.
_POOL = 16
# Stands for a turn's text to find where a template puts it; no text has this (Unicode: for internal use).
_MARK = "\ufdd0\ufdd1"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """Tokens of one record, and which of them are learned (True in `learned`).

    For an encoder-decoder, `tokens` are the decoder's and `source` are the encoder's; else it is empty.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    record: Record
    source: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.source) + len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Answer tokens in the loss."""
        return int(self.learned.sum())


@dataclass
class Examples:
    """A tokenised set of records, and what was cut from it."""

    items: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    merged: int = 0

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_learned(self) -> int:
        """Tokens that count in the loss."""
        return sum(item.num_targets for item in self.items)

    def describe(self, name: str, max_length: int) -> str:
        """Sizes, and every cut that was made."""
        tokens = sum(item.num_tokens for item in self.items)
        text = f"{name}: {len(self):,} records, {tokens:,} tokens, {self.num_learned:,} of them answers"
        if self.truncated:
            text += f"; {self.truncated:,} cut to {max_length} tokens"
        if self.dropped:
            text += f"; {self.dropped:,} dropped, no answer token left"
        if self.merged:
            text += f"; in {self.merged:,} the tokenizer merges the ends of prompt and answer"
        return text


@dataclass
class Data:
    """Both parts of the data and the reading they come from."""

    train: Examples
    evaluation: Examples
    reading: Reading

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all tokens and masks: a resumed run must see the same data."""
        digest = hashlib.sha256()
        for item in itertools.chain(self.train.items, self.evaluation.items):
            digest.update(len(item.tokens).to_bytes(8, "little"))
            digest.update(item.tokens.tobytes())
            digest.update(item.learned.tobytes())
            digest.update(item.source.tobytes())
        return digest.hexdigest()


def load_data(config: FinetuneConfig, tokenizer: Any, encoder_decoder: bool = False) -> Data:
    """Read, split and tokenise the data of a run.

    Args:
        config: The run.
        tokenizer: The model's.
        encoder_decoder: Whether the model reads prompts apart from answers.

    Raises:
        DataError: A record cannot be used.
        EmptyTargetError: No record has an answer token within `max_length`.
    """
    options = config.dataset
    if config.data_files:
        reading = read_records(config.data_files, options)
    else:
        reading = Reading(records=default_records())
    if options.eval_data is not None:
        train = reading.records
        held = without_leakage(
            read_records([options.eval_data], options).records, train, options.split_by
        )
        if not held:
            shared, way_out = "prompt", ""
            if options.split_by == "prompt_and_answer":
                shared, way_out = "prompt or answer", ", or --dataset.split_by prompt"
            raise DataError(
                f"every record of dataset.eval_data '{options.eval_data}' has a {shared} that is "
                f"also trained on, so its loss would say nothing. Fix: other records{way_out}"
            )
    else:
        train, held = split_records(
            reading.records, options.eval_fraction, options.split_by, config.run.seed
        )
    make = tokenize_apart if encoder_decoder else tokenize
    return Data(
        make(train, tokenizer, options.max_length),
        make(held, tokenizer, options.max_length),
        reading,
    )


def tokenize(records: list[Record], tokenizer: Any, max_length: int) -> Examples:
    """Tokens and answer masks of the records.

    Raises:
        DataError: The chat template refuses a record.
        EmptyTargetError: There are records, but none has an answer token within `max_length`.
    """
    examples = Examples()
    shortest_prompt = None
    for record in records:
        pieces = _pieces(record, tokenizer)
        tokens, learned, merged = _encode(pieces, tokenizer)
        examples.merged += merged
        examples.truncated += len(tokens) > max_length
        if not learned[:max_length].any():
            examples.dropped += 1
            prompt = int(learned.argmax())
            shortest_prompt = min(prompt, shortest_prompt or prompt)
            continue
        examples.items.append(Example(tokens[:max_length], learned[:max_length], record))
    if records and not examples.items:
        raise EmptyTargetError(
            f"{examples.dropped:,} of {len(records):,} records have no answer token within "
            f"max_length={max_length} (shortest prompt: {shortest_prompt} tokens), so the loss would be 0/0. "
            f"First: {records[0].place}. "
            f"Fix: --dataset.max_length above {shortest_prompt}"
        )
    return examples


def tokenize_apart(records: list[Record], tokenizer: Any, max_length: int) -> Examples:
    """As `tokenize` for an encoder-decoder: the last answer is learned from all that comes before it.

    Each side is cut to `max_length` tokens by itself, the encoder's with its end-of-sequence mark kept.

    Raises:
        DataError: The chat template refuses a record, or its mask leaves the answer out.
    """
    examples = Examples()
    for record in records:
        text, answer = _apart(record, tokenizer)
        special = not getattr(tokenizer, "chat_template", None)  # a template has written them
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        source = tokenizer(text, add_special_tokens=special)["input_ids"] or end
        target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *end]
        if not source or not answer.strip():
            examples.dropped += 1
            continue
        examples.truncated += max(len(source), len(target)) > max_length
        if len(source) > max_length:
            cut = {"truncation": True, "max_length": max_length}
            source = tokenizer(text, add_special_tokens=special, **cut)["input_ids"]
        tokens = np.asarray(target[:max_length], dtype=np.int32)
        whole = np.ones(len(tokens), dtype=np.bool_)
        examples.items.append(Example(tokens, whole, record, np.asarray(source, dtype=np.int32)))
    return examples


def _apart(record: Record, tokenizer: Any) -> tuple[str, str]:
    """What an encoder reads of a record, and its last answer."""
    if "assistant" not in record.learned:
        raise DataError(
            f"{record.place}: an encoder-decoder learns the last answer, which the "
            "record's mask leaves out. Fix: mask 'User', or a decoder model."
        )
    last = max(index for index, (role, _) in enumerate(record.turns) if role == "assistant")
    before, answer = record.turns[:last], record.turns[last][1]
    if getattr(tokenizer, "chat_template", None):
        with _template_of(record):
            messages = [{"role": role, "content": text} for role, text in before]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return str(text), answer
    if len(before) == 1:
        return before[0][1], answer
    return "\n".join(f"{role}: {text}" for role, text in before), answer


@contextlib.contextmanager
def _template_of(record: Record) -> Iterator[None]:
    """Name the record that a chat template refuses."""
    try:
        yield
    except Exception as error:  # a template is a program of the model's author: anything may come
        raise DataError(
            f"{record.place}: the tokenizer's chat template refuses the record "
            f"({type(error).__name__}: {error})."
        ) from error


def _pieces(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a record cut into (piece, learned) in order."""
    if not getattr(tokenizer, "chat_template", None):
        return _plain_pieces(record, tokenizer)
    messages = [{"role": role, "content": text} for role, text in record.turns]

    def render(turns: list[dict[str, str]], prompt: bool) -> str:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return str(text)

    def before(index: int) -> str:
        """What comes before the text of a turn."""
        if record.turns[index][0] == "assistant":
            return render(messages[:index], True)
        stand_in = messages[index] | {"content": _MARK}
        return render([*messages[:index], stand_in], False).partition(_MARK)[0]

    with _template_of(record):
        whole = render(messages, False)
        spans = []
        for index, (role, _) in enumerate(record.turns):
            if role in record.learned and (index > 0 or role != "assistant"):
                head, upto = before(index), render(messages[: index + 1], False)
                # A template may rewrite earlier turns (drop their reasoning, say); what it shows
                # differently in the whole conversation cannot be located there and is not learned.
                if whole.startswith(upto) and upto.startswith(head):
                    spans.append((len(head), _end_of_turn(upto, len(head), tokenizer)))
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(whole[position:start], False), (whole[start:end], True)]
        position = end
    pieces.append((whole[position:], False))
    return [(text, learned) for text, learned in pieces if text]


def _end_of_turn(text: str, start: int, tokenizer: Any) -> int:
    """End of the turn with its end-of-sequence mark, without what templates put behind it."""
    mark = tokenizer.eos_token
    found = text.rfind(mark, start) if mark else -1
    return found + len(mark) if found >= 0 else len(text)


def _plain_pieces(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """Without a template: prompt and completion as they stand, or turns headed by their role."""
    end = tokenizer.eos_token or ""
    bos = tokenizer.bos_token
    starts_with_bos = bos and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    pieces = [(bos, False)] if starts_with_bos else []
    if record.is_pair:
        pieces += [(record.prompt, False), (record.answer + end, True)]
    else:
        for role, text in record.turns:
            pieces.append((f"{role}: ", False))
            learned = role in record.learned
            pieces.append((text + (end if role == "assistant" or learned else "\n"), learned))
    return [(text, learned) for text, learned in pieces if text]


def _encode(
    pieces: list[tuple[str, bool]], tokenizer: Any
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], bool]:
    """Tokens of the joined pieces, which are learned, and whether a token spans two pieces.

    Pieces tokenised one by one give the exact mask, if together they are the tokens of the whole
    text, as a model sees it that continues a prompt. Where the tokenizer merges across a border, the
    whole text's tokens are kept and a token is learned that holds a part of an answer.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    parts = [encode(text) for text, _ in pieces]
    whole = encode("".join(text for text, _ in pieces))
    merged = whole != list(itertools.chain.from_iterable(parts))
    if merged:
        learned = np.zeros(len(whole), dtype=np.bool_)
        position, start = 0, 0
        for text, is_answer in pieces:
            position += len(text)
            prefix = encode("".join(text for text, _ in pieces)[:position])
            end = _common(whole, prefix)
            cut = end < len(prefix)  # the next token of the whole begins in this piece
            learned[start : end + cut] |= is_answer
            start = end
    else:
        learned = np.concatenate(
            [np.full(len(p), flag) for p, (_, flag) in zip(parts, pieces, strict=True)]
        )
    learned[:1] = False  # nothing comes before the first token that it could be predicted from
    return np.asarray(whole, dtype=np.int32), learned, merged


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def step_indices(lengths: list[int], step_size: int, seed: int, step: int) -> list[int]:
    """Which records optimiser step `step` (from 0) trains on.

    A pure function of the step, so that a resumed run needs no other position. Every epoch is its own
    permutation; within pools of 16 steps records of like length come together.
    """
    count = len(lengths)
    steps_per_epoch = -(-count // step_size)
    epoch, position = divmod(step, steps_per_epoch)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    pools = [order[i : i + _POOL * step_size] for i in range(0, count, _POOL * step_size)]
    steps: list[list[int]] = []
    for pool in pools:
        by_length = sorted(pool.tolist(), key=lambda index: lengths[index])
        groups = [by_length[i : i + step_size] for i in range(0, len(by_length), step_size)]
        steps += [groups[i] for i in random.permutation(len(groups))]
    return steps[position]


def collate(items: list[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad examples on the right.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 [batch, longest]; labels that are not
        learned are -100. A label stands at its own token's position. For an encoder-decoder the first two
        are the encoder's.
    """
    labels = [np.where(item.learned, item.tokens, IGNORED) for item in items]
    read = [item.source if len(item.source) else item.tokens for item in items]
    batch = {
        "input_ids": _padded(read, pad_id),
        "attention_mask": _padded([np.ones_like(row) for row in read], 0),
        "labels": _padded(labels, IGNORED),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _padded(rows: list[npt.NDArray[Any]], value: int) -> torch.Tensor:
    """Rows of any lengths as int64 [rows, longest]."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return out
