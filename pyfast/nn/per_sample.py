# SPDX-License-Identifier: Apache-2.0
"""A batch in which each sample has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyfast.errors import ConfigError

BASE = "__base__"
"""PEFT's name for a sample without an adapter."""


class Samples:
    """The adapter of each sample. Samples are rows of a module's first dimension; while `copies` is not 1,
    as beam search has it, that many copies of each sample may follow one another."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.copies = 1
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor | None]] = {}

    def adapted(
        self, y: Tensor, held: Iterable[str], adapt: Callable[..., Tensor], *inputs: Tensor
    ) -> Tensor:
        """A tensor whose rows are exchanged for those that their samples' adapters give.

        Args:
            y: [samples, ...]; it is not changed.
            held: adapters that take part; the rows of samples of others stay as they are.
            adapt: called with an adapter's name, its rows of y and of each of the inputs; gives its rows of
                the result, in y's dtype.
            inputs: [samples, ...].

        Raises:
            ConfigError: y has other than the samples that were named.
        """
        copied, found = False, self._rows_of(y)
        for name in held:
            if name not in found:
                continue
            rows = found[name]
            if rows is None:
                return adapt(name, y, *inputs)
            part = adapt(name, y[rows], *(tensor[rows] for tensor in inputs))
            y = y.index_copy_(0, rows, part) if copied else y.index_copy(0, rows, part)
            copied = True
        return y

    def check(self, count: int, copies: int) -> None:
        """Raise ConfigError unless so many rows are one of each sample, or so many copies."""
        if count not in (len(self.names), len(self.names) * copies):
            raise ConfigError(
                f"adapters_per_sample: {len(self.names)} names were given, but the batch has {count} rows; "
                "give one name for each sample"
            )

    def _rows_of(self, y: Tensor) -> dict[str, Tensor | None]:
        """The adapters' rows; None where all are one adapter's."""
        count = y.shape[0] if y.ndim else 0
        self.check(count, self.copies)
        found = self._rows.get((count, y.device))
        if found is None:
            found = self._rows[count, y.device] = self._placed(count, y.device)
        return found

    def _placed(self, count: int, device: torch.device) -> dict[str, Tensor | None]:
        copies = count // len(self.names)
        groups: dict[str, list[int]] = {}
        for row in range(count):
            groups.setdefault(self.names[row // copies], []).append(row)
        if len(groups) == 1:
            return dict.fromkeys(groups)
        with torch.inference_mode(False):  # kept for later calls, which may need gradients
            return {name: torch.tensor(group, device=device) for name, group in groups.items()}
