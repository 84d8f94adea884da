# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyfast.errors import ConfigError, DataError
from pyfast.train.config import DatasetOptions
from pyfast.train.forms import Record
from pyfast.train.records import normalized, read_records, split_records, without_leakage


def write(path: Path, *lines: str | bytes) -> str:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return str(path)


def test_three_forms_are_told_apart_per_file(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    messages = {"messages": [*turns, {"role": "assistant", "content": "a"}]}
    files = [
        write(tmp_path / "nemo.jsonl", '{"input": "a", "output": "b"}'),
        write(tmp_path / "pair.jsonl", "", '{"prompt": "c", "completion": "d", "extra": 1}'),
        write(tmp_path / "chat.jsonl", json.dumps(messages)),
    ]
    records = read_records(files, DatasetOptions()).records
    assert [record.turns for record in records] == [
        (("user", "a"), ("assistant", "b")),
        (("user", "c"), ("assistant", "d")),
        (("system", "s"), ("user", "q"), ("assistant", "a")),
    ]
    assert [record.line for record in records] == [1, 2, 1]
    assert records[2].prompt == "s\nq"


def test_fields_of_another_form_that_is_not_whole_are_passed_over(tmp_path: Path) -> None:
    """As in data sets whose chats repeat their question, or have an empty column for each form."""
    answer = {"role": "assistant", "content": "a"}
    row = {"messages": [{"role": "user", "content": "q"}, answer], "prompt": "q"}
    rows = [row, row | {"completion": None}, row | {"input": "q"}]
    file = write(tmp_path / "chat.jsonl", *map(json.dumps, rows))
    records = read_records([file], DatasetOptions(deduplicate=False)).records
    assert [record.turns for record in records] == [(("user", "q"), ("assistant", "a"))] * 3


def test_bytes_survive_unchanged(tmp_path: Path) -> None:
    """Line separators other than newline, a byte-order mark and carriage returns are no line ends."""
    text = "a\u2028b\u0085c\x0b d \U0001f600"
    row = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False)
    file = write(
        tmp_path / "a.jsonl", b"\xef\xbb\xbf" + row.encode() + b"\r", row.replace("x", "y")
    )
    records = read_records([file], DatasetOptions()).records
    assert [record.prompt for record in records] == [text, text]
    assert [record.line for record in records] == [1, 2]


PLAIN = b"".join(
    b'{"prompt": "p%d", "completion": "%d"}\n' % (i, random.Random(i).getrandbits(300))
    for i in range(500)
)
DAMAGED = {
    "text.gz": PLAIN,
    "torn.gz": gzip.compress(PLAIN)[:-4000],
    "flipped.gz": gzip.compress(PLAIN)[:-8] + b"checksum",
    "text.bz2": PLAIN,
    "torn.bz2": bz2.compress(PLAIN)[:-4000],
    "text.xz": PLAIN,
    "torn.xz": lzma.compress(PLAIN)[:-4000],
    "text.zip": PLAIN,
    "text.zst": PLAIN,
    "text.tar": PLAIN,
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
def test_file_that_is_not_what_its_ending_says(
    tmp_path: Path, name: str, on_bad_record: Any
) -> None:
    file = tmp_path / name
    file.write_bytes(DAMAGED[name])
    with pytest.raises(DataError) as caught:
        read_records([str(file)], DatasetOptions(on_bad_record=on_bad_record))
    text = str(caught.value)
    assert re.search(rf"{re.escape(str(file))} line [\d,]+: ", text)
    assert f"its ending '{file.suffix}' says" in text
    assert "Fix: write the file again" in text


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zip", zipped)],
)
def test_compressed_files_are_read_by_their_ending(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    texts = ["plain", "\u00c9p\u00e9e", "\u201cquoted\u201d \u4e2d", "caf\u00c3\u00a9"]
    lines = [json.dumps({"prompt": t, "completion": t}, ensure_ascii=False) for t in texts]
    file = tmp_path / f"a.jsonl.{ending}"
    file.write_bytes(pack("\n".join(lines).encode()))
    records = read_records([str(file)], DatasetOptions()).records
    assert [record.answer for record in records] == texts


def test_an_archive_of_two_files_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "two.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", PLAIN)
        archive.writestr("b.jsonl", PLAIN)
    with pytest.raises(DataError, match="holds 2 files"):
        read_records([str(file)], DatasetOptions())


GOOD = '{"prompt": "p", "completion": "c"}'
BAD = [
    ('{"prompt": "p", "completion": "c', 31, "invalid JSON (Unterminated string"),
    ('{"prompt": "p" "completion": "c"}', 16, "invalid JSON (Expecting ',' delimiter"),
    ('{"prompt": "p", "completion": 3}', 17, "field 'completion' must be text, this is a number"),
    ('{"prompt": null, "completion": "c"}', 2, "field 'prompt' must be text, this is null"),
    ('{"prompt": "p"}', 1, "field 'completion' is missing"),
    ("[1, 2]", 1, "must be a JSON object, this is a list"),
    ('"text"', 1, "must be a JSON object, this is text"),
    ('{"prompt": "\\ud800", "completion": "c"}', 2, "half of a surrogate pair"),
    (b'{"prompt": "\xc3\xa9\xff", "completion": "c"}', 14, "byte 0xff is not UTF-8"),
    ("[" * 100_000, 1, "nested too deeply"),
    (f'{{"prompt": {"9" * 5000}, "completion": "c"}}', 12, "an integer has more than 4,300 digits"),
    (f'{{"prompt": "p", "completion": "c", "n": {"9" * 5000}}}', 41, "more than 4,300 digits"),
    (b'{"prompt": "\xed\xa0\x80", "completion": "c"}', 13, "byte 0xed is not UTF-8"),
    (
        '{"prompt": "p", "completion": "c", "messages": []}',
        1,
        "holds prompt/completion and messages;",
    ),
    ('{"prompt": "p", "completion": "c", "input": "i", "output": "o"}', 1, "and input/output;"),
]


@pytest.mark.parametrize(("line", "column", "reason"), BAD)
def test_bad_record_is_named(tmp_path: Path, line: str | bytes, column: int, reason: str) -> None:
    file = write(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(DataError) as caught:
        read_records([file], DatasetOptions())
    assert f"t.jsonl line 2, column {column}: " in str(caught.value)
    assert reason in str(caught.value)
    assert "on_bad_record skip" in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("[]", "'messages' is an empty list"),
        ('[{"role": "user", "content": "q"}]', "has no assistant turn"),
        ('[{"role": "assistant", "content": "q"}]', "has no assistant turn"),
        ('[{"role": "bot", "content": "q"}]', "'messages[0].role' is 'bot'"),
        ('[{"role": "user"}]', "field 'messages[0].content' is missing"),
        ('[{"role": ["user"], "content": ""}]', "'messages[0].role' is ['user']"),
        ("[7]", "'messages[0]' must be an object, this is a number"),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: str, reason: str) -> None:
    file = write(tmp_path / "t.jsonl", f'{{"messages": {messages}}}')
    with pytest.raises(DataError, match=r"line 1, column [12]:") as caught:
        read_records([file], DatasetOptions())
    assert reason in str(caught.value)


def test_skip_counts_and_has_a_limit(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(99)]
    file = write(tmp_path / "t.jsonl", *lines, "oops")
    reading = read_records([file], DatasetOptions(on_bad_record="skip"))
    assert len(reading.records) == 99
    assert "line 100" in reading.describe_skipped()
    write(tmp_path / "t.jsonl", *lines, "oops", "oops")
    with pytest.raises(
        DataError, match=r"2 of 101 records are bad, more than .*=0\.01 allows"
    ) as caught:
        read_records([file], DatasetOptions(on_bad_record="skip"))
    share = str(caught.value).partition("Fix them, or --dataset.max_bad_fraction ")[2]
    enough = DatasetOptions(on_bad_record="skip", max_bad_fraction=float(share))
    assert len(read_records([file], enough).records) == 99


def test_missing_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.jsonl' does not exist"):
        read_records([str(tmp_path / "no.jsonl")], DatasetOptions())
    with pytest.raises(
        DataError, match=r"no record was found in .*Fix: a file with one JSON object"
    ):
        read_records([write(tmp_path / "empty.jsonl", "", " ")], DatasetOptions())


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("data[1].jsonl", ["data1.jsonl"]),
        ("q?.jsonl", ["qa.jsonl"]),
        ("star*.jsonl", ["star1.jsonl", "star2.jsonl"]),
        ("a::b.jsonl", []),
        ("file.j[s]onl", ["file.jsonl"]),
        ("packed[1].jsonl.gz", ["packed1.jsonl.gz"]),
    ],
)
def test_file_is_read_by_its_very_name(tmp_path: Path, name: str, others: list[str]) -> None:
    for file, text in ((name, GOOD), *((other, GOOD.replace("p", "other")) for other in others)):
        content = f"{text}\n".encode()
        (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith("gz") else content)
    (record,) = read_records([str(tmp_path / name)], DatasetOptions()).records
    assert (record.prompt, record.file) == ("p", str(tmp_path / name))


def test_pipe_is_refused_for_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match=r"pipe\.jsonl' is no regular file\. Fix"):
        read_records([str(tmp_path / "pipe.jsonl")], DatasetOptions())


def test_repeated_records_are_counted(tmp_path: Path) -> None:
    other = GOOD.replace('"c"', '"d"')
    file = write(tmp_path / "t.jsonl", GOOD, GOOD, other)
    assert len(read_records([file], DatasetOptions(deduplicate=False)).records) == 3
    reading = read_records([file], DatasetOptions())
    assert (len(reading.records), reading.duplicates) == (2, 1)


def pairs(count: int, prompts: int, answers: int, seed: int = 0) -> list[Record]:
    draw = random.Random(seed)
    return [
        Record.pair(f"Q {draw.randrange(prompts)}?", f"A {draw.randrange(answers)}", "f", i)
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_split_shares_neither_prompt_nor_answer(seed: int) -> None:
    records = pairs(300, 400, 400, seed)
    train, held = split_records(records, 0.1, "prompt_and_answer", seed)
    assert sorted(r.line for r in (*train, *held)) == list(range(300))
    assert 15 <= len(held) <= 30
    for text in (lambda r: normalized(r.prompt), lambda r: normalized(r.answer)):
        assert not {text(r) for r in train} & {text(r) for r in held}


def test_split_is_by_wording_not_by_case() -> None:
    records = [
        Record.pair(p, str(i), "f", i) for i, p in enumerate(["Hi there!", "hi  there", "x", "y"])
    ]
    for seed in range(10):
        _, held = split_records(records, 0.5, "prompt", seed)
        lines = {record.line for record in held}
        assert len(lines & {0, 1}) in (0, 2)


def test_labels_as_answers_need_a_split_by_prompt() -> None:
    records = [Record.pair(f"text {i}", ["good", "bad"][i % 2], "f", i) for i in range(50)]
    with pytest.raises(ConfigError, match=r"--dataset\.split_by prompt"):
        split_records(records, 0.1, "prompt_and_answer", 0)
    train, held = split_records(records, 0.1, "prompt", 0)
    assert (len(train), len(held)) == (45, 5)


def test_records_of_an_evaluation_file_that_are_trained_on_are_left_out() -> None:
    train = [Record.pair("one", "1", "f", 1)]
    held = [
        Record.pair("One!", "9", "g", 1),
        Record.pair("two", "1", "g", 2),
        Record.pair("3", "3", "g", 3),
    ]
    assert [r.line for r in without_leakage(held, train, "prompt_and_answer")] == [3]
    assert [r.line for r in without_leakage(held, train, "prompt")] == [2, 3]
