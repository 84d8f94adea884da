# SPDX-License-Identifier: Apache-2.0
"""Compare two result files, or the providers of one with the frozen layers:

    python -m benchmarks.compare OLD.json NEW.json
    python -m benchmarks.compare FILE.json

Two files: exits with 1 if a row of the new one is slower than the old one's by more than the threshold.
One file: ratios to the faster of `frozen` and `frozen_lt`, where there are none to `torch`, for the backward
alone from the differences fwdbwd - fwd.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, str, str]
FROZEN = ("frozen", "frozen_lt")


def read_rows(path: Path) -> dict[Key, Row]:
    """Measured rows of a file by case, mode, dtype and provider."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        (row["case"], row["mode"], row["dtype"], row["provider"]): row
        for row in rows
        if "absent" not in row
    }


def compare(
    old: dict[Key, Row], new: dict[Key, Row], column: str, threshold: float
) -> tuple[str, list[Key]]:
    """A table of the rows in both, and the keys that got slower by more than `threshold`."""
    lines = [f"{'case':<48}{'mode':<8}{'provider':<14}{'old us':>11}{'new us':>11}{'new/old':>9}"]
    slower: list[Key] = []
    for key in sorted(old.keys() & new.keys()):
        before, after = old[key].get(column), new[key].get(column)
        if before is None or after is None:
            continue
        ratio = after / before
        mark = ""
        if ratio > threshold:
            slower.append(key)
            mark = "  slower"
        case, mode, _, provider = key
        lines.append(
            f"{case:<48}{mode:<8}{provider:<14}{before * 1e3:>11.1f}{after * 1e3:>11.1f}"
            f"{ratio:>9.3f}{mark}"
        )
    for label, only in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if only:
            lines.append(f"{len(only)} rows only in the {label} file")
    devices = {row["device"] for row in (*old.values(), *new.values())}
    if len(devices) > 1:
        lines.append(f"The files come from different devices: {', '.join(sorted(devices))}")
    return "\n".join(lines), slower


def _ratio(time: float | None, floor: float | None) -> str:
    return f"{time / floor:>9.3f}" if time is not None and floor else f"{'-':>9}"


def _parts(times: dict[str, float]) -> dict[str, float | None]:
    """Forward, backward, both and whole steps, from the times by mode."""
    forward, both = times.get("fwd"), times.get("fwdbwd")
    backward = None if forward is None or both is None else both - forward
    return {"fwd": forward, "bwd": backward, "both": both, "step": times.get("step")}


def ratios(rows: dict[Key, Row], column: str, only: str | None = None) -> str:
    """A table of each provider's times over the floor's, case by case; `only` one provider's."""
    cases: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for (case, mode, dtype, provider), row in rows.items():
        if row.get(column) is not None:
            providers = cases.setdefault((case, dtype), {})
            providers.setdefault(provider, {})[mode] = row[column]
    lines = [f"{'case':<48}{'provider':<14}" + "".join(f"{part:>9}" for part in _parts({}))]
    for (case, _), providers in sorted(cases.items()):
        floor = [providers.pop(name) for name in FROZEN if name in providers]
        if not floor and "torch" in providers:
            floor = [providers.pop("torch")]
        if not floor:
            continue
        modes = {mode for times in floor for mode in times}
        best = {mode: min(times[mode] for times in floor if mode in times) for mode in modes}
        floors = _parts(best)
        for provider, times in sorted(providers.items()):
            if only not in (None, provider):
                continue
            cells = [_ratio(time, floors[part]) for part, time in _parts(times).items()]
            lines.append(f"{case:<48}{provider:<14}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", help="without it: ratios to frozen in OLD")
    parser.add_argument("--column", default="burst_ms_p50", help="default: burst_ms_p50")
    parser.add_argument("--threshold", type=float, default=1.05, help="largest new/old: 1.05")
    parser.add_argument("--provider", help="only this provider's rows")
    options = parser.parse_args(arguments)
    if options.new is None:
        print(ratios(read_rows(options.old), options.column, options.provider))
        return 0
    old, new = (
        {k: row for k, row in read_rows(path).items() if options.provider in (None, k[3])}
        for path in (options.old, options.new)
    )
    if not old.keys() & new.keys():
        print("the two files have no row in common", file=sys.stderr)
        return 1
    text, slower = compare(old, new, options.column, options.threshold)
    print(text)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
