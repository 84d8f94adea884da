# SPDX-License-Identifier: Apache-2.0
"""Training records: read from JSONL, checked field by field, deduplicated and split without leakage."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import math
import random
import re
import shutil
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pyfast.errors import ConfigError, DataError
from pyfast.train.config import DatasetOptions
from pyfast.train.forms import BadRecord, Record, parse

_MAX_LISTED = 5


@dataclass
class Reading:
    """The records of some files, and what was left out of them."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    duplicates: int = 0

    def describe_skipped(self) -> str:
        """One line for each of the first skipped records, empty when none was skipped."""
        lines = [f"  skipped {reason}" for reason in self.skipped[:_MAX_LISTED]]
        if (more := len(self.skipped) - _MAX_LISTED) > 0:
            lines.append(f"  ... and {more} more")
        return "\n".join(lines)


def normalized(text: str) -> str:
    """Lower case without punctuation and repeated space: what counts as the same text."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return " ".join(words) or text.strip()


def read_records(files: list[str], options: DatasetOptions) -> Reading:
    """Read files of records in one of the forms of `pyfast.train.forms`: JSONL, or a .json of one array.

    The form is found from the first good record of each file; empty lines are passed over.

    Args:
        files: Paths; a compressed file is opened by its ending.
        options: Decides about bad and repeated records.

    Raises:
        ConfigError: A file does not exist, or is a directory or a pipe.
        DataError: A record cannot be used (named by file, line and column), too many are bad, or
            none is left.
    """
    reading = Reading()
    seen: set[object] = set()
    total = 0
    for file in files:
        if not Path(file).is_file():
            there = "is no regular file" if Path(file).exists() else "does not exist"
            raise ConfigError(f"data file '{file}' {there}. Fix: the path of a JSONL file.")
        form: str | None = None
        unit = "record" if _is_array(file) else "line"
        for line, raw in _elements(file) if unit == "record" else _lines(file):
            total += 1
            try:
                form, record = parse(raw, form, file, line)
            except BadRecord as bad:
                column = "character" if unit == "record" else "column"
                message = f"{file} {unit} {line:,}, {column} {bad.column}: {bad}"
                if options.on_bad_record == "raise":
                    raise DataError(
                        f"{message} Fix the {unit}, or --dataset.on_bad_record skip"
                    ) from None
                reading.skipped.append(message)
                continue
            content = record.turns, record.learned
            if options.deduplicate and content in seen:
                reading.duplicates += 1
                continue
            seen.add(content)
            reading.records.append(replace(record, unit=unit))
    bad_count = len(reading.skipped)
    if bad_count > options.max_bad_fraction * total:
        enough = math.ceil(1000 * bad_count / total) / 1000
        raise DataError(
            f"{bad_count:,} of {total:,} records are bad, more than "
            f"dataset.max_bad_fraction={options.max_bad_fraction:g} allows. First: {reading.skipped[0]} "
            f"Fix them, or --dataset.max_bad_fraction {enough:g}"
        )
    if not reading.records:
        raise DataError(
            f"no record was found in {', '.join(files)}. Fix: a file with one JSON object a line, such as "
            '{"prompt": "2 + 2 =", "completion": " 4"}'
        )
    return reading


def _is_array(file: str) -> bool:
    """Whether a file is a .json, perhaps packed, that begins as an array."""
    path = Path(file)
    if (path.with_suffix("") if path.suffix in _UNPACK else path).suffix != ".json":
        return False
    with _readable(file), _plain_name(file) as plain, Path(plain).open("rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf")
        while start and not start.strip():
            start = stream.read(64)
        return start.lstrip().startswith(b"[")


def _elements(file: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each element of the array that a file is.

    Raises:
        DataError: It is no whole array; what comes behind the damage cannot be found again.
    """
    # As latin-1 each byte is a character, so that bad UTF-8 is told with the record that has it; so are
    # integers that are too large.
    decoder = json.JSONDecoder(parse_int=str)
    with _readable(file), _plain_name(file) as path:
        text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    number, position = 0, text.index("[") + 1

    def skip_space(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    try:
        position = skip_space(position)
        while text[position : position + 1] != "]":
            _, end = decoder.raw_decode(text, position)
            number += 1
            yield number, text[position:end].encode("latin-1")
            position = skip_space(end)
            if text[position : position + 1] != "]":
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
                position = skip_space(position + 1)
        if (position := skip_space(position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except (json.JSONDecodeError, RecursionError) as error:
        what, where = "JSON is nested too deeply", position
        if isinstance(error, json.JSONDecodeError):
            what, where = f"invalid JSON ({error.msg})", error.pos
        line = text.count("\n", 0, where) + 1
        column = where - text.rfind("\n", 0, where)
        raise DataError(
            f"{file} line {line:,}, column {column:,}, after {number:,} whole records of the array: "
            f"{what}. Fix: write the array again, as a whole."
        ) from None


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not empty."""
    from datasets import load_dataset  # type: ignore[import-untyped]

    # latin-1 maps every byte to one character, so that a bad UTF-8 sequence is found in its own
    # line and not reported for a whole block of the file.
    number = 0
    with _readable(file, lambda: number), _plain_name(file) as path:
        lines = load_dataset(
            "text", data_files=[path], split="train", streaming=True, encoding="latin-1"
        )
        for number, row in enumerate(lines, start=1):
            raw = row["text"].encode("latin-1")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, raw


@contextlib.contextmanager
def _readable(file: str, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Tell in a sentence that a file is not what its ending says, and behind which line.

    Raises:
        DataError: It is not.
    """
    try:
        yield
    except Exception as error:  # each compression library has errors of its own
        ending = Path(file).suffix
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise DataError(
            f"{file} line {done() + 1:,}: from about here on the file cannot be read as its ending "
            f"'{ending}' says ({type(error).__name__}: {reason}). "
            "Fix: write the file again, plain as .jsonl or whole as .gz, .bz2, .xz or .zip."
        ) from error


@contextlib.contextmanager
def _plain_name(file: str) -> Iterator[str]:
    """A path to the file's text without *, ?, [ and ::, which datasets takes for patterns and archives.

    Compressed files are unpacked here: datasets decodes them as UTF-8 whatever encoding it is asked for.
    """
    ending = Path(file).suffix
    with tempfile.TemporaryDirectory(prefix="pyfast-") as directory:
        plain = Path(directory) / "data"
        if ending in _UNPACK:
            with _UNPACK[ending](file) as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        else:
            plain = plain.with_suffix(re.sub(r"[^.\w]", "_", ending))
            plain.symlink_to(Path(file).resolve())
        yield str(plain)


def _open_zip(file: str) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} files, one is read")
    return archive.open(names[0])


_UNPACK: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": _open_zip,
}


def split_records(
    records: list[Record], fraction: float, split_by: str, seed: int
) -> tuple[list[Record], list[Record]]:
    """Hold out about `fraction` of the records so that no prompt (nor answer) is on both sides.

    Records that share a normalised prompt, or with `split_by="prompt_and_answer"` an answer, form
    a group; whole groups are drawn in an order that the seed decides.

    Returns:
        The training and the held-out records, each in their given order.

    Raises:
        ConfigError: The groups are so large that nothing can be held out.
    """
    if fraction == 0:
        return records, []
    groups = _groups(records, split_by)
    wanted = max(1, round(fraction * len(records)))
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held:
        largest = max(len(group) for group in groups)
        fix = "--dataset.eval_fraction 0"
        if split_by == "prompt_and_answer":
            fix = f"--dataset.split_by prompt (answers that are labels repeat by nature), or {fix}"
        raise ConfigError(
            f"cannot hold out {wanted} of {len(records)} records: {largest} of them hang together by shared "
            f"prompts or answers, and a group must stay on one side. Fix: {fix}, or --dataset.eval_data FILE"
        )
    train = [record for index, record in enumerate(records) if index not in held]
    return train, [records[index] for index in sorted(held)]


def without_leakage(evaluation: list[Record], train: list[Record], split_by: str) -> list[Record]:
    """The held-out records of a file of their own, less those whose prompt or answer is trained on."""
    trained = {key for record in train for key in _keys(record, split_by)}
    return [record for record in evaluation if trained.isdisjoint(_keys(record, split_by))]


def _keys(record: Record, split_by: str) -> list[tuple[str, str]]:
    keys = [("prompt", normalized(record.prompt))]
    if split_by == "prompt_and_answer":
        keys.append(("answer", normalized(record.answer)))
    return keys


def _groups(records: list[Record], split_by: str) -> list[list[int]]:
    """Connected components of the records under shared keys (union-find)."""
    parent = list(range(len(records)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        for key in _keys(record, split_by):
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(records)):
        groups[root(index)].append(index)
    return list(groups.values())
