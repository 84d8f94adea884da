# SPDX-License-Identifier: Apache-2.0
"""Sample answers of a run, for its user to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pyfast.train.config import FinetuneConfig
from pyfast.train.data import Data, Example
from pyfast.train.exact_match import parts
from pyfast.train.metrics import say
from pyfast.train.model import answer, greedy


class Samples:
    """Answers to a few held-out questions before and after training, kept in samples.json.

    A question is all that comes before a record's last answer.
    """

    def __init__(self, config: FinetuneConfig, data: Data, output: Path) -> None:
        self._file = output / "samples.json"
        self._max_new_tokens = config.run.max_new_tokens
        limit, count = config.dataset.max_length, config.run.samples
        self._items: dict[str, Example] = {}
        items = [item for item in data.evaluation.items if _can_be_asked(item, limit)]
        for item in items:
            self._items.setdefault(_question(item), item)
        self.rows: list[dict[str, str]] = []
        if self._file.exists():  # a resumed run keeps its answers from before
            self.rows = json.loads(self._file.read_text(encoding="utf-8"))
            return
        chosen: set[str] = set()
        # Spread over the held-out records, each question once.
        for item in items[:: max(1, len(items) // max(1, count))]:
            question = _question(item)
            if len(self.rows) < count and question not in chosen:
                chosen.add(question)
                self.rows.append({"prompt": question, "reference": item.record.turns[-1][1]})
        if count and data.evaluation.items and not items:
            say(
                "No sample answers: no held-out record ends with an answer that is learned and within "
                f"dataset.max_length={limit}\n"
            )

    def ask(self, model: Any, tokenizer: Any, when: str) -> None:
        """Answer every question; `when` is "before" or "after"."""
        for row in self.rows:
            item = self._items.get(row["prompt"])
            if item is None or _is_single_turn(item):
                row[when] = answer(model, tokenizer, row["prompt"], self._max_new_tokens)
            else:
                asked = torch.tensor([parts(item)[0]])
                row[when] = greedy(model, tokenizer, asked, self._max_new_tokens)
        self._file.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False), encoding="utf-8")

    def show(self) -> None:
        """Print question, both answers and the reference."""
        for row in self.rows:
            say(f"\nQ: {row['prompt']}")
            for name in ("before", "after", "reference"):
                say(f"   {name + ':':<10} {' '.join(row.get(name, '').split())}")


def _is_single_turn(item: Example) -> bool:
    return len(item.record.turns) == 2


def _can_be_asked(item: Example, max_length: int) -> bool:
    """Whether a record ends with an answer whose tokens tell where it begins."""
    if _is_single_turn(item):
        return True
    learned = item.record.turns[-1][0] == "assistant" and "assistant" in item.record.learned
    return learned and len(item.tokens) < max_length and bool(parts(item)[0])


def _question(item: Example) -> str:
    """The text before the last answer."""
    return "\n".join(text for _, text in item.record.turns[:-1])
