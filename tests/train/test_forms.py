# SPDX-License-Identifier: Apache-2.0
"""NeMo's chats, ShareGPT and Alpaca: read, learned where they should be, refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyfast.errors import DataError
from pyfast.train import finetune
from pyfast.train.config import DatasetOptions
from pyfast.train.data import tokenize
from pyfast.train.forms import Record
from pyfast.train.records import read_records

Make = Callable[..., Any]
NEMO = {
    "system": "be brief",
    "mask": "User",
    "type": None,
    "conversations": [
        {"from": "User", "value": "hi", "label": None},
        {"from": "Assistant", "value": "hello", "label": None},
        {"from": "User", "value": "user bye", "label": None},
        {"from": "Assistant", "value": "ciao", "label": None},
    ],
}
SHAREGPT = {
    "id": "x_0",
    "conversations": [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ],
}
LABELLED = {
    "mask": "User",
    "type": "VALUE_TO_TEXT",
    "conversations": [
        {"from": "User", "value": "hi", "label": None},
        {"from": "Assistant", "value": "hello", "label": "toxicity:0"},
    ],
}
ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Record]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records([str(file)], DatasetOptions()).records


def rendered(tokenizer: Any, record: Record, count: int, prompt: bool) -> list[int]:
    """Oracle: the first turns of a record through transformers alone."""
    messages = [{"role": role, "content": text} for role, text in record.turns[:count]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    return list(ids)


def test_turns_of_each_form(tmp_path: Path) -> None:
    (nemo,) = read(tmp_path, NEMO)
    assert nemo.turns == (
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "user bye"),
        ("assistant", "ciao"),
    )
    assert nemo.learned == ("assistant",)
    (chat,) = read(tmp_path, SHAREGPT)
    assert chat.turns == (("system", "s"), ("user", "q"), ("assistant", "a"))
    rows = [ALPACA, {**ALPACA, "input": ""}, {"instruction": "i", "output": "o"}]
    records = read(tmp_path, *rows, {**ALPACA, "instruction": "x", "input": None})
    assert [record.prompt for record in records] == ["Add.\n\n1, 2", "Add.", "i", "x"]
    assert [record.answer for record in records] == ["3", "3", "o", "3"]


@pytest.mark.parametrize("row", [NEMO, SHAREGPT, ALPACA], ids=["nemo", "sharegpt", "alpaca"])
def test_loss_is_on_the_answers_of_the_template(
    tmp_path: Path, byte_tokenizer: Make, row: dict[str, Any]
) -> None:
    """Oracle: what the template adds when it is rendered with one more turn."""
    tokenizer = byte_tokenizer()
    (record,) = read(tmp_path, row)
    (item,) = tokenize([record], tokenizer, 512).items
    newline = tokenizer("\n")["input_ids"]  # the template's, behind each end
    expected: list[bool] = []
    for index, (role, _) in enumerate(record.turns):
        upto = rendered(tokenizer, record, index + 1, False)
        if role == "assistant":
            before = rendered(tokenizer, record, index, True)
            assert upto[: len(before)] == before
            expected += [False] * (len(before) - len(expected))
            expected += [True] * (len(upto) - len(newline) - len(before))
        expected += [False] * (len(upto) - len(expected))
    assert item.tokens.tolist() == upto
    assert item.learned.tolist() == expected


@pytest.mark.parametrize(
    ("mask", "learned"),
    [
        ("Assistant", "hi<|end|>user bye<|end|>"),
        ("User", "hello<|end|>ciao<|end|>"),
        (["User"], "hello<|end|>ciao<|end|>"),
        (["System"], "hi<|end|>hello<|end|>user bye<|end|>ciao<|end|>"),
        (None, "hello<|end|>ciao<|end|>"),
    ],
)
@pytest.mark.parametrize("system", ["be brief", ""])
def test_mask_says_whose_turns_are_not_learned(
    tmp_path: Path, byte_tokenizer: Make, mask: Any, learned: str, system: str
) -> None:
    tokenizer = byte_tokenizer()
    (record,) = read(tmp_path, {**NEMO, "mask": mask, "system": system})
    (item,) = tokenize([record], tokenizer, 512).items
    assert tokenizer.decode(item.tokens[item.learned]) == learned
    (item,) = tokenize([record], byte_tokenizer(None), 512).items
    assert tokenizer.decode(item.tokens[item.learned]) == learned


def test_records_that_differ_in_their_mask_are_two(tmp_path: Path) -> None:
    assert len(read(tmp_path, NEMO, {**NEMO, "mask": "Assistant"}, NEMO)) == 2


def with_turn(**turn: Any) -> dict[str, Any]:
    return {"conversations": [turn, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": []}, "'conversations' is an empty list"),
        ({"conversations": "hi"}, "'conversations' must be a list of turns, this is text"),
        ({"conversations": [1]}, "'conversations[0]' must be an object, this is a number"),
        (with_turn(value="q"), "'conversations[0].from' is None; it must be one of system, user,"),
        (with_turn(**{"from": "Bob", "value": "q"}), "'conversations[0].from' is 'Bob'"),
        (with_turn(**{"from": "human"}), "'conversations[0].value' is missing"),
        (with_turn(**{"from": "human", "value": 3}), "'conversations[0].value' must be text"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no assistant turn after another"),
        ({**NEMO, "system": 4}, "field 'system' must be text, this is a number"),
        ({**NEMO, "type": "OTHER"}, "'type' is 'OTHER'; it must be null or one of VALUE_TO_TEXT,"),
        (
            LABELLED,
            "'conversations[1].label' is 'toxicity:0' under type 'VALUE_TO_TEXT'; turns with",
        ),
        ({**NEMO, "mask": "Alice"}, "field 'mask' is 'Alice'; it must be one of system, user,"),
        ({**NEMO, "mask": ["User", "Assistant"]}, "which leaves no turn to learn"),
        ({"instruction": "i"}, "field 'output' is missing"),
        ({"instruction": "i", "output": None}, "field 'output' must be text, this is null"),
        ({**ALPACA, "input": 5}, "field 'input' must be text, this is a number"),
        ({**ALPACA, "messages": [1]}, "holds instruction/output and messages; one form is read"),
        ({**SHAREGPT, "messages": [1]}, "holds messages and conversations; one form is read"),
        ({"text": "x"}, "fields ['text'] are none of prompt/completion, input/output, instr"),
    ],
)
def test_bad_record_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl line 1, column \d+: ") as caught:
        read(tmp_path, row)
    assert reason in str(caught.value)


@pytest.mark.parametrize("row", [NEMO, SHAREGPT, ALPACA], ids=["nemo", "sharegpt", "alpaca"])
def test_finetune_reads_them(make_config: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    options = DatasetOptions(eval_fraction=0)
    assert finetune(make_config(data=str(file), steps=2, dataset=options)).steps == 2


@pytest.mark.parametrize("kind", ["VALUE_TO_TEXT", "TEXT_TO_VALUE"])
def test_turns_without_a_label_are_read_whatever_the_type(tmp_path: Path, kind: str) -> None:
    """As NeMo does: it puts nothing in the place of a label that is null or missing."""
    missing = [{k: v for k, v in turn.items() if k != "label"} for turn in NEMO["conversations"]]
    (plain,) = read(tmp_path, NEMO)
    for row in ({**NEMO, "type": kind}, {**NEMO, "type": kind, "conversations": missing}):
        (record,) = read(tmp_path, row)
        assert (record.turns, record.learned) == (plain.turns, plain.learned)


EMPTY = [{"from": "User", "value": "q"}, {"from": "Assistant", "value": None}]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("empty", ["", " \n"])
@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "p", "completion": None}, "completion"),
        ({"input": "p", "output": None}, "output"),
        ({"instruction": "p", "output": None}, "output"),
        ({"messages": [message("user", "q"), {"role": "assistant", "content": None}]}, "messages"),
        ({"conversations": EMPTY}, "conversations"),
        ({"mask": "User", "conversations": EMPTY}, "conversations"),
    ],
)
def test_a_record_without_answer_text_is_bad(
    tmp_path: Path, row: dict[str, Any], field: str, empty: str
) -> None:
    filled = json.loads(json.dumps(row).replace("null", json.dumps(empty)))
    with pytest.raises(DataError, match=f"line 1, .*'{field}' has no answer text"):
        read(tmp_path, filled)


def test_other_turns_may_be_empty(tmp_path: Path) -> None:
    turns = [message("system", ""), message("user", "q"), message("assistant", "")]
    row = {"messages": [*turns, message("user", ""), message("assistant", "a")]}
    (record,) = read(tmp_path, row)
    assert record.answer == "\na"


def test_two_forms_in_one_file_are_told(tmp_path: Path) -> None:
    first = {"input": "q", "output": "a"}
    chat = {"messages": [message("user", "q"), message("assistant", "a")]}
    cases = [
        (first, chat, "input/output", "messages"),
        (chat, first, "messages", "input/output"),
        (ALPACA, first, "instruction/output", "input/output"),
        (first, {"prompt": "q"}, "input/output", "prompt/completion"),
    ]
    for one, other, form, found in cases:
        with pytest.raises(DataError, match="line 2, ") as caught:
            read(tmp_path, one, other)
        text = f"first record has the form {form}, this one looks like {found};"
        assert text in str(caught.value)
        assert "--data '[a.jsonl, b.jsonl]'" in str(caught.value)
