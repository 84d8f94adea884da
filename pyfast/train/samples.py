# SPDX-License-Identifier: Apache-2.0
"""Sample answers of a run, for its user to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyfast.train.data import Data
from pyfast.train.metrics import say
from pyfast.train.model import answer


class Samples:
    """Answers to a few held-out questions before and after training, kept in samples.json."""

    def __init__(self, count: int, data: Data, output: Path) -> None:
        self._file = output / "samples.json"
        self.rows: list[dict[str, str]] = []
        if self._file.exists():  # a resumed run keeps its answers from before
            self.rows = json.loads(self._file.read_text(encoding="utf-8"))
            return
        prompts: set[str] = set()
        items = data.evaluation.items
        # Spread over the held-out records, each question once, single turns only.
        for item in items[:: max(1, len(items) // max(1, count))]:
            record = item.record
            if len(self.rows) < count and len(record.turns) == 2 and record.prompt not in prompts:
                prompts.add(record.prompt)
                self.rows.append({"prompt": record.prompt, "reference": record.answer})

    def ask(self, model: Any, tokenizer: Any, when: str) -> None:
        """Answer every question; `when` is "before" or "after"."""
        for row in self.rows:
            row[when] = answer(model, tokenizer, row["prompt"])
        self._file.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False), encoding="utf-8")

    def show(self) -> None:
        """Print question, both answers and the reference."""
        for row in self.rows:
            say(f"\nQ: {row['prompt']}")
            for name in ("before", "after", "reference"):
                say(f"   {name + ':':<10} {' '.join(row.get(name, '').split())}")
