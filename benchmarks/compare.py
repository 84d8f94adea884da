# SPDX-License-Identifier: Apache-2.0
"""Compare two result files: `python -m benchmarks.compare OLD.json NEW.json`.

Exits with 1 if a row of the new file is slower than the old one's by more than the threshold.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--column", default="burst_ms_p50", help="default: burst_ms_p50")
    parser.add_argument("--threshold", type=float, default=1.05, help="largest new/old: 1.05")
    parser.add_argument("--provider", help="only this provider's rows")
    options = parser.parse_args(arguments)
    old, new = read_rows(options.old), read_rows(options.new)
    if options.provider:
        old = {key: row for key, row in old.items() if key[3] == options.provider}
        new = {key: row for key, row in new.items() if key[3] == options.provider}
    if not old.keys() & new.keys():
        print("the two files have no row in common", file=sys.stderr)
        return 1
    text, slower = compare(old, new, options.column, options.threshold)
    print(text)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
