# SPDX-License-Identifier: Apache-2.0
"""The records that are learned when none are named: the English part of chatterbot-corpus.

Most of its entries repeat each other (tech_support.yml holds 1050 entries but 10 different ones), so they
are deduplicated here before anything is split.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pyfast.train.default_model import package_dir
from pyfast.train.forms import Record
from pyfast.train.records import normalized

PACKAGE = "chatterbot-corpus"
VERSION = "1.3.3"
LICENSE = """\
Training data: the English conversations of chatterbot-corpus 1.3.3 by Gunther Cox and contributors,
BSD 3-Clause License, https://github.com/gunthercox/chatterbot-corpus
Selected: the first question and answer of every conversation, at most 400 characters, without code;
repeated pairs and questions in nearly the same words are dropped.
"""
_MAX_CHARACTERS = 400
_NEAR_DUPLICATE = 0.75


def default_records() -> list[Record]:
    """Question and answer pairs of the default data, deduplicated, in a fixed order.

    Raises:
        ConfigError: The package is not installed.
    """
    english = package_dir(PACKAGE, VERSION, "The default training data") / "data" / "english"
    pairs: dict[tuple[str, str], Record] = {}
    for file in sorted(english.glob("*.yml")):
        for number, (question, answer) in enumerate(_pairs(file), start=1):
            key = (normalized(question), normalized(answer))
            pairs.setdefault(key, Record.pair(question, answer, file.name, number))
    return _without_near_duplicates(list(pairs.values()))


def _pairs(file: Path) -> list[tuple[str, str]]:
    """First question and answer of each conversation; later entries are alternatives or small talk."""
    conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    pairs = []
    for turns in conversations:
        if isinstance(turns, list) and len(turns) >= 2:
            question, answer = (re.sub(r"\s+", " ", str(turn)).strip() for turn in turns[:2])
            short = max(len(question), len(answer)) <= _MAX_CHARACTERS
            if question and answer and short and "```" not in answer:
                pairs.append((question, answer))
    return pairs


def _without_near_duplicates(records: list[Record]) -> list[Record]:
    """Drop a question that shares at least 3/4 of its words with another, differently worded one."""
    kept: list[Record] = []
    seen: dict[str, frozenset[str]] = {}
    for record in records:
        key = normalized(record.prompt)
        words = frozenset(key.split())
        near = any(
            other != key and len(words & theirs) >= _NEAR_DUPLICATE * len(words | theirs)
            for other, theirs in seen.items()
        )
        if not near:
            seen[key] = words
            kept.append(record)
    return kept
