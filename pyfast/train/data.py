# SPDX-License-Identifier: Apache-2.0
"""From records to token batches: chat template, answer mask, truncation, order of training."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pyfast.errors import DataError, EmptyTargetError
from pyfast.train.config import FinetuneConfig
from pyfast.train.default_data import default_records
from pyfast.train.records import Reading, Record, read_records, split_records, without_leakage

IGNORED = -100
# Steps' worth of records that are sorted by length together, to spend less on padding.
_POOL = 16

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """Tokens of one record, and which of them are learned (True in `learned`)."""

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    record: Record

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
        tokens = sum(len(item.tokens) for item in self.items)
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
        return digest.hexdigest()


def load_data(config: FinetuneConfig, tokenizer: Any) -> Data:
    """Read, split and tokenise the data of a run.

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
            raise DataError(
                f"every record of dataset.eval_data '{options.eval_data}' has a prompt or answer that is "
                "also trained on, so its loss would say nothing. "
                "Fix: other records, or dataset.split_by=prompt."
            )
    else:
        train, held = split_records(
            reading.records, options.eval_fraction, options.split_by, config.run.seed
        )
    return Data(
        tokenize(train, tokenizer, options.max_length),
        tokenize(held, tokenizer, options.max_length),
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
            f"First: {records[0].file} line {records[0].line:,}. "
            f"Fix: dataset.max_length above {shortest_prompt}."
        )
    return examples


def _pieces(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a record cut into (piece, learned) in order."""
    if not getattr(tokenizer, "chat_template", None):
        return _plain_pieces(record, tokenizer)
    messages = [{"role": role, "content": text} for role, text in record.turns]

    def render(count: int, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    try:
        whole = render(len(messages), False)
        spans = []
        for index, (role, _) in enumerate(record.turns):
            if role == "assistant" and index > 0:
                before, upto = render(index, True), render(index + 1, False)
                # A template may rewrite earlier turns (drop their reasoning, say); what it shows
                # differently in the whole conversation cannot be located there and is not learned.
                if whole.startswith(upto) and upto.startswith(before):
                    spans.append((len(before), _end_of_answer(upto, len(before), tokenizer)))
    except Exception as error:  # a template is a program of the model's author: anything may come
        raise DataError(
            f"{record.file} line {record.line:,}: the tokenizer's chat template refuses the record "
            f"({type(error).__name__}: {error})."
        ) from error
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(whole[position:start], False), (whole[start:end], True)]
        position = end
    pieces.append((whole[position:], False))
    return [(text, learned) for text, learned in pieces if text]


def _end_of_answer(text: str, start: int, tokenizer: Any) -> int:
    """End of the answer with its end-of-sequence mark, without what templates put behind it."""
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
            pieces.append((text + end, True) if role == "assistant" else (text + "\n", False))
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
        learned are -100. A label stands at its own token's position.
    """
    longest = max(len(item.tokens) for item in items)
    shape = (len(items), longest)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, item in enumerate(items):
        ids = torch.from_numpy(item.tokens.astype(np.int64))
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.where(torch.from_numpy(item.learned), ids, IGNORED)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
