# SPDX-License-Identifier: Apache-2.0
"""Answers to held-out records, compared with the expected ones: exact match as SQuAD defines it."""

from __future__ import annotations

import re
import string
from typing import Any

import numpy as np
import torch

from pyfast.train.data import Example
from pyfast.train.model import greedy

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Text in lower case without punctuation, English articles and extra white space.

    This is `normalize_answer` of SQuAD's evaluate-v1.1.py (Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions
    for Machine Comprehension of Text", https://rajpurkar.github.io/SQuAD-explorer/), steps in its order.
    """
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def parts(item: Example) -> tuple[list[int], list[int]]:
    """What the model is asked, and the last answer, as tokens."""
    if len(item.source):
        return item.source.tolist(), item.tokens.tolist()
    last = int(np.flatnonzero(item.learned)[-1]) + 1
    before = np.flatnonzero(~item.learned[:last])
    start = int(before[-1]) + 1 if len(before) else 0
    return item.tokens[:start].tolist(), item.tokens[start:last].tolist()


def chosen(items: list[Example], count: int, max_length: int) -> list[Example]:
    """At most so many records, spread over all whose last answer was not cut off."""
    whole = [item for item in items if len(item.tokens) < max_length and parts(item)[0]]
    places = np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)
    return [whole[place] for place in places]


def exact_match(
    model: Any, tokenizer: Any, items: list[Example], max_new_tokens: int
) -> float | None:
    """Percentage of records whose greedy answer is the expected one, both normalised; None of no records."""
    if not items:
        return None
    hits = 0
    for item in items:
        asked, expected = parts(item)
        found = greedy(model, tokenizer, torch.tensor([asked]), max_new_tokens)
        reference = str(tokenizer.decode(expected, skip_special_tokens=True))
        hits += normalized(found) == normalized(reference)
    return 100 * hits / len(items)
