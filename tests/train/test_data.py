# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyfast.errors import DataError, EmptyTargetError
from pyfast.train.data import IGNORED, Examples, collate, step_indices, tokenize
from pyfast.train.records import Record

Make = Callable[..., Any]


def one(record: Record, tokenizer: Any, max_length: int = 512) -> tuple[str, str, Examples]:
    """All text and the learned text of a record, as the tokenizer decodes them."""
    examples = tokenize([record], tokenizer, max_length)
    item = examples.items[0]
    return tokenizer.decode(item.tokens), tokenizer.decode(item.tokens[item.learned]), examples


def test_only_the_answer_and_its_end_are_learned(byte_tokenizer: Make) -> None:
    text, learned, _ = one(
        Record.pair("what \u00e9?", "it \U0001f600 is", "f", 1), byte_tokenizer()
    )
    assert text == "<|user|>what \u00e9?<|end|>\n<|assistant|>it \U0001f600 is<|end|>\n"
    assert learned == "it \U0001f600 is<|end|>"


def test_every_assistant_turn_is_learned(byte_tokenizer: Make) -> None:
    turns = (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "b"), ("assistant", "c"))
    text, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer())
    assert text.count("<|assistant|>") == 2
    assert learned == "b<|end|>c<|end|>"


def test_answer_that_looks_like_the_template_does_not_move_the_mask(byte_tokenizer: Make) -> None:
    turns = (("user", "<|assistant|>x<|end|>"), ("assistant", "y <|end|> z"))
    _, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer())
    assert learned == "y <|end|> z<|end|>"


def test_template_that_rewrites_history_learns_what_it_can_locate(byte_tokenizer: Make) -> None:
    """Like templates that drop the reasoning of all turns but the last."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = (("user", "a"), ("assistant", "long"), ("user", "b"), ("assistant", "c"))
    text, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer(template))
    assert text == "<|user|>a<|end|><|assistant|>-<|end|><|user|>b<|end|><|assistant|>c<|end|>"
    assert learned == "c<|end|>"


def test_template_that_refuses_a_record_names_it(byte_tokenizer: Make) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    record = Record((("user", "a"), ("assistant", "b")), False, "d.jsonl", 7)
    with pytest.raises(DataError, match=r"d\.jsonl line 7: .* refuses .*roles must alternate"):
        tokenize([record], byte_tokenizer(template), 512)


def test_without_template_prompt_and_answer_are_joined(byte_tokenizer: Make) -> None:
    text, learned, _ = one(Record.pair("2+2=", "4", "f", 1), byte_tokenizer(None))
    assert (text, learned) == ("2+2=4<|end|>", "4<|end|>")
    turns = (("user", "a"), ("assistant", "b"))
    text, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer(None))
    assert (text, learned) == ("user: a\nassistant: b<|end|>", "b<|end|>")


def test_token_across_the_border_is_learned_and_counted(byte_tokenizer: Make) -> None:
    """The tokenizer merges "=4"; the whole text's tokens are kept and the merged one is learned."""
    tokenizer = byte_tokenizer(None, merges=(("=", "4"),))
    text, learned, examples = one(Record.pair("2+2=", "42", "f", 1), tokenizer)
    assert (text, learned) == ("2+2=42<|end|>", "=42<|end|>")
    assert examples.merged == 1
    assert "merges the ends" in examples.describe("training", 512)


def test_first_token_is_never_a_target(byte_tokenizer: Make) -> None:
    examples = tokenize([Record.pair("", "ab", "f", 1)], byte_tokenizer(None), 512)
    assert examples.items[0].learned.tolist() == [False, True, True]


def test_cuts_are_counted(byte_tokenizer: Make) -> None:
    tokenizer = byte_tokenizer(None)
    records = [
        Record.pair("12345", "6", "f", 1),  # 7 tokens with the end mark
        Record.pair(
            "12345", "678", "f", 2
        ),  # 9: cut to 8, one answer byte left of three and the mark
        Record.pair("12345678", "9", "f", 3),  # nothing of the answer is left
    ]
    examples = tokenize(records, tokenizer, 8)
    assert [len(item.tokens) for item in examples.items] == [7, 8]
    assert (examples.truncated, examples.dropped, examples.num_learned) == (2, 1, 2 + 3)
    text = examples.describe("training", 8)
    assert "2 cut to 8 tokens" in text
    assert "1 dropped, no answer token left" in text


def test_nothing_to_learn_is_an_error(byte_tokenizer: Make) -> None:
    records = [Record.pair("x" * 30, "y", "t.jsonl", 1), Record.pair("x" * 40, "y", "t.jsonl", 2)]
    with pytest.raises(EmptyTargetError) as caught:
        tokenize(records, byte_tokenizer(None), 16)
    assert "2 of 2 records have no answer token within max_length=16" in str(caught.value)
    assert "shortest prompt: 30 tokens" in str(caught.value)
    assert "First: t.jsonl line 1." in str(caught.value)


def test_collate_pads_on_the_right(byte_tokenizer: Make) -> None:
    tokenizer = byte_tokenizer(None)
    items = tokenize(
        [Record.pair("a", "b", "f", 1), Record.pair("ab", "cd", "f", 2)], tokenizer, 9
    ).items
    batch = collate(items, 99, torch.device("cpu"))
    a, b, c, d = (tokenizer.convert_tokens_to_ids(x) for x in "abcd")
    end = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[a, b, end, 99, 99], [a, b, c, d, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, b, end, no, no], [no, no, c, d, end]]


@pytest.mark.parametrize(("count", "size"), [(40, 4), (41, 4), (3, 8), (1, 1), (200, 3)])
def test_each_epoch_visits_every_record_once(count: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, count).tolist()
    steps = -(-count // size)
    epochs = [
        [step_indices(lengths, size, 5, epoch * steps + step) for step in range(steps)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert Counter(i for step in epoch for i in step) == Counter(range(count))
        assert all(0 < len(step) <= size for step in epoch)
    if count > 8:
        assert epochs[0] != epochs[1] != epochs[2]
        assert step_indices(lengths, size, 6, 0) != epochs[0][0]


def test_pools_spend_little_on_padding() -> None:
    lengths = np.random.default_rng(0).integers(8, 200, 512).tolist()
    padded = used = 0
    for step in range(64):
        chosen = [lengths[i] for i in step_indices(lengths, 8, 0, step)]
        padded += max(chosen) * len(chosen)
        used += sum(chosen)
    assert used / padded > 0.85
