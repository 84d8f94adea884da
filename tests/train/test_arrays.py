# SPDX-License-Identifier: Apache-2.0
"""Files that are one JSON array of records, as Alpaca and ShareGPT are published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pyfast.errors import DataError
from pyfast.train import finetune
from pyfast.train.config import DatasetOptions
from pyfast.train.records import read_records
from tests.train.test_forms import ALPACA, SHAREGPT

TEXT = '\u00c9p\u00e9e \u4e2d\u2028[{"},'


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [{**ALPACA, "input": f"{TEXT} {i}"} for i in range(count)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_it_is_read_as_its_records_in_lines_are(
    tmp_path: Path, indent: int | None, ascii_only: bool
) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    text = json.dumps(rows(), indent=indent, ensure_ascii=ascii_only)
    array.write_bytes(b"\xef\xbb\xbf\n " + text.encode() + b"\n")
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    expected = read_records([str(lines)], DatasetOptions()).records
    for file in (array, packed):
        found = read_records([str(file)], DatasetOptions()).records
        assert [record.turns for record in found] == [record.turns for record in expected]
        assert [record.place for record in found] == [f"{file} record {i}" for i in (1, 2, 3)]


def test_lines_in_a_json_file_stay_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("\n".join(json.dumps(row) for row in rows()))
    found = read_records([str(file)], DatasetOptions()).records
    assert [record.place for record in found] == [f"{file} line {i}" for i in (1, 2, 3)]


def test_bad_record_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    bad: list[Any] = [{"instruction": "i", "output": 3}, 7, {"instruction": "i", "output": ""}]
    file.write_text(json.dumps([*rows(1), *bad]))
    with pytest.raises(
        DataError, match=r"a\.json record 2, character 22: .*Fix the record, or --data"
    ):
        read_records([str(file)], DatasetOptions())
    options = DatasetOptions(on_bad_record="skip", max_bad_fraction=0.8)
    reading = read_records([str(file)], options)
    assert len(reading.records) == 1
    assert ["record 2" in reading.skipped[0], "record 3" in reading.skipped[1]] == [True, True]
    file.write_bytes(json.dumps(rows(1)).encode()[:-1] + b', {"instruction": "caf\xe9"}]')
    with pytest.raises(DataError, match="record 2, character 21: byte 0xe9 is not UTF-8"):
        read_records([str(file)], DatasetOptions())
    file.write_text(f'[{{"instruction": {"9" * 5000}, "output": "a"}}]')
    with pytest.raises(DataError, match=r"record 1, .*more than 4,300 digits"):
        read_records([str(file)], DatasetOptions())


@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[{"instruction": "i",\n "output": "o"}\n', "line 3, column 1, after 1 whole records", "Expecting"),
        ('[{"instruction": "i",\n "output": "o"} {', "line 2, column 17, after 1 whole records", "','"),
        ('[{"instruction": "i"\n', "line 2, column 1, after 0 whole records", "Expecting"),
        ('[{"instruction": "i", "output": "o"}] x', "line 1, column 39, after 1 whole records", "Extra"),
        ("[" * 100_000, "after 0 whole records", "nested too deeply"),
    ],
)  # fmt: skip
def test_damaged_array_is_told_with_its_place(
    tmp_path: Path, text: str, place: str, reason: str, on_bad_record: Any
) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    options = DatasetOptions(on_bad_record=on_bad_record, max_bad_fraction=1.0)
    with pytest.raises(DataError) as caught:
        read_records([str(file)], options)
    for part in (place, reason, "Fix: write the array again"):
        assert part in str(caught.value)


def test_an_empty_array_has_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[ ]")
    with pytest.raises(DataError, match="no record was found"):
        read_records([str(tmp_path / "a.json")], DatasetOptions())


def test_an_array_by_another_name_is_told_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for indent in (None, 1):
        file.write_text(json.dumps(rows(), indent=indent))
        with pytest.raises(DataError, match=r"one array of records is read where its name ends in"):
            read_records([str(file)], DatasetOptions())


def test_finetune_reads_it(make_config: Any, tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([SHAREGPT], indent=1))
    options = DatasetOptions(eval_fraction=0)
    assert finetune(make_config(data=str(file), steps=1, dataset=options)).steps == 1
