# SPDX-License-Identifier: Apache-2.0
"""Measure providers on cases, in one process and interleaved: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, train_step
from benchmarks.cases import Case, select
from benchmarks.operands import Operands, make_operands, oracle, relative_error
from benchmarks.prepared import Absent, Prepared
from benchmarks.providers import NAMES, prepare
from benchmarks.timing import Clock, Subject, interleave, quantile, transient_mib
from pyfast.ops import recorded_kernels

SCHEMA = "pyfast-bench/1"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = {"": "cold", "burst_": "burst", "graph_": "graph_cold", "graph_burst_": "graph_burst"}
MODES = ("fwd", "fwdbwd", "step")
MAX_COPIES = 8
SHORT_PROVIDERS = ["frozen", "frozen_lt", "torch", "peft", "bitsandbytes", "pyfast"]
"""Those that need not compile or be imported for long."""
Row = dict[str, Any]


def make_copies(case: Case, mode: str, dtype: torch.dtype, clock: Clock) -> list[Operands]:
    """As many copies of the operands as it takes for their weights not to fit the cache twice over."""
    make = train_step.make_operands if case.op == "train_step" else make_operands
    first = make(case, dtype, clock.device, seed=0)
    if mode == "step":  # it reads whatever it holds
        return [first]
    size = case.bytes("fwd", dtype.itemsize)
    count = min(MAX_COPIES, 1 + 2 * clock.cache_bytes // size)
    copies = [first] + [make(case, dtype, clock.device, seed) for seed in range(1, int(count))]
    if mode == "fwdbwd":
        for operands in copies:
            for leaf in operands.leaves():
                leaf.requires_grad_()
    return copies


def expected(case: Case, mode: str, copies: list[Operands]) -> tuple[str, list[torch.Tensor]]:
    """The oracle's name and tensors for the first copy.

    What bitsandbytes defines, its bytes and values, is compared with bitsandbytes itself if it is there.
    """
    if case.op == "copy":
        return "exact", [copies[0].w]
    if case.op == "train_step":
        return "fp32", train_step.oracle(copies[0])
    if case.op in ("nf4_quantize", "nf4_dequantize"):
        for name in ("bitsandbytes", "torch"):
            try:
                peer = prepare(name, case, mode, copies[:1])
            except Absent:
                continue
            return name, peer.read(peer.step(0))
    return "fp64", oracle(copies[0], mode)


def check(
    prepared: Prepared, want: list[torch.Tensor], mode: str, operands: Operands
) -> tuple[float | None, list[str]]:
    """Error of the first copy against the oracle, and the pyfast kernels that ran."""
    torch.manual_seed(0)
    with recorded_kernels() as names:
        out = prepared.step(0)
    kernels = sorted({kernel for _, kernel in names})
    if prepared.read is None:
        return None, kernels
    if prepared.keep is not None:
        torch.manual_seed(0)
        want = oracle(operands, mode, prepared.keep)
    return relative_error(prepared.read(out), want), kernels


def subject_of(
    row: Row, case: Case, copies: list[Operands], oracle_name: str, want: list[torch.Tensor],
    clock: Clock,
) -> Subject:  # fmt: skip
    """A provider's checked step, ready to be measured; what the check found goes into its row."""
    gc.collect()
    before = clock.allocated() if clock.cuda else 0
    prepared = prepare(row["provider"], case, row["mode"], copies)
    error, kernels = check(prepared, want, row["mode"], copies[0])
    row["max_err"], row["oracle"], row["kernel"] = error, oracle_name, ",".join(kernels) or None
    row["wrong"] = error is not None and not error <= case.tolerance
    row["peak_mib"] = transient_mib(prepared.step, clock)
    if prepared.shared_bytes is not None:
        row["total_mib"] = None
        if clock.cuda:
            held = clock.allocated() - before + prepared.shared_bytes
            row["total_mib"] = held / 2**20 + row["peak_mib"]
    row |= prepared.facts
    return Subject(prepared.step, clock, len(copies), prepared.around, prepared.graphs)


def measure(
    case: Case, mode: str, options: argparse.Namespace, clock: Clock, rng: random.Random
) -> list[Row]:
    """One row for each provider: measured, or absent with the reason, such as an error of a peer's."""
    dtype = DTYPES[options.dtype]
    rows: list[Row] = [
        {"case": case.name, "provider": name, "mode": mode, "shape": case.shape,
         "dtype": options.dtype} for name in options.provider
    ]  # fmt: skip
    try:
        copies = make_copies(case, mode, dtype, clock)
    except Absent as reason:
        return [{**row, "absent": str(reason)} for row in rows]
    oracle_name, want = expected(case, mode, copies)
    subjects: list[tuple[Row, Subject]] = []
    for i, row in enumerate(rows):
        try:
            subjects.append((row, subject_of(row, case, copies, oracle_name, want, clock)))
        except Absent as reason:
            row["absent"] = str(reason)
        except Exception as error:
            if row["provider"] == "pyfast":
                raise
            first = next(iter(str(error).splitlines()), "")
            facts = {key: row[key] for key in ("case", "provider", "mode", "shape", "dtype")}
            rows[i] = {**facts, "absent": f"{type(error).__name__}: {first}"}
    del want
    rounds = interleave([subject for _, subject in subjects], options.seconds, rng)
    for row, subject in subjects:
        row |= {"rounds": rounds, "copies": len(copies), "burst": subject.burst}
        if subject.graph_error:
            row["graph_error"] = subject.graph_error
        row |= _statistics(case, mode, dtype, subject)
    return rows


def _statistics(case: Case, mode: str, dtype: torch.dtype, subject: Subject) -> Row:
    row: Row = {}
    for prefix, attribute in COLUMNS.items():
        values = getattr(subject.samples, attribute)
        for label, q in (("p50", 0.5), ("p20", 0.2), ("p80", 0.8)):
            row[f"{prefix}ms_{label}"] = quantile(values, q)
    # Rates are the device's where its own time is known, else those of the eager call.
    seconds = (row["graph_ms_p50"] or row["ms_p50"]) / 1e3
    flops = case.flops(mode)
    row["tflops"] = flops / seconds / 1e12 if flops else None
    moved = None if mode == "step" else case.bytes(mode, dtype.itemsize)
    row["gbps"] = moved / seconds / 1e9 if moved else None
    return row


def facts(device: torch.device) -> Row:
    """What every row says about the machine and the code."""
    found = machine.versions()
    return {
        "schema": SCHEMA,
        "device": machine.device_name(device),
        "driver": machine.driver_version(device),
        "cuda": found["cuda"],
        "torch": found["torch"],
        "pyfast": found["pyfast"],
        "peers": {name: found[name] for name in machine.PEERS},
        "trees": machine.trees(),
    }


def reference_row(rows: list[Row], references: Sequence[str]) -> Row | None:
    """The first reference provider that was measured; of the frozen ones the fastest in bursts."""
    for name in references:
        both = (name, f"{name}_lt")
        found = [row for row in rows if row["provider"] in both and "absent" not in row]
        if found:
            return min(found, key=lambda row: row["burst_ms_p50"])
    return None


def table(rows: list[Row], references: Sequence[str]) -> str:
    """The rows of one case and mode as text; ratios are to the reference, below 1 is faster."""
    reference = reference_row(rows, references)
    shape = " ".join(f"{letter}={size}" for letter, size in rows[0]["shape"].items())
    lines = [
        f"{rows[0]['case']}  {rows[0]['mode']}  {rows[0]['dtype']}  {shape}"
        f"  (x: ratio to {reference['provider'] if reference else 'nothing'})",
        f"  {'provider':<13}{'cold us [p20, p80]':>28}{'x':>7}{'burst':>11}{'x':>7}{'graph':>11}"
        f"{'x':>7}{'g.burst':>11}{'x':>7}{'TFLOP/s':>9}{'GB/s':>8}{'MiB':>8}{'max err':>10}  kernel",
    ]
    for row in rows:
        if "absent" in row:
            continue
        spread = f"{_us(row['ms_p50'])} [{_us(row['ms_p20'])}, {_us(row['ms_p80'])}]"
        cells = f"  {row['provider']:<13}{spread:>28}{_ratio(row, reference, ''):>7}"
        for prefix in list(COLUMNS)[1:]:
            cells += f"{_us(row[f'{prefix}ms_p50']):>11}{_ratio(row, reference, prefix):>7}"
        cells += f"{_number(row['tflops'], '.2f'):>9}{_number(row['gbps'], '.1f'):>8}"
        cells += f"{_number(row['peak_mib'], '.0f'):>8}{_number(row['max_err'], '.1e'):>10}  "
        liger = " with Liger" if row.get("liger") else ""
        cells += f"{row['kernel'] or ''}{liger}{' WRONG' if row['wrong'] else ''}"
        lines.append(cells.rstrip())
    absent = [f"{row['provider']} ({row['absent']})" for row in rows if "absent" in row]
    if absent:
        lines.append(f"  absent: {', '.join(absent)}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _us(milliseconds: float | None) -> str:
    return _number(None if milliseconds is None else milliseconds * 1e3, ".1f")


def _ratio(row: Row, reference: Row | None, prefix: str) -> str:
    key = f"{prefix}ms_p50"
    if reference is None or row[key] is None or reference[key] is None:
        return "-"
    return format(row[key] / reference[key], ".2f")


def write_rows(path: Path, rows: list[Row]) -> None:
    """A JSON array with one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _names(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    result = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = result.add_argument
    add("--case", default="*", metavar="GLOB", help="cases by name; 'tiny/*' tries the runner")
    add("--short", action="store_true",
        help="few cases, quick providers, one second each: about two minutes in all")  # fmt: skip
    add("--provider", type=_names(NAMES), metavar="A,B",
        help=f"default: all; with --short {','.join(SHORT_PROVIDERS)}")  # fmt: skip
    add("--mode", type=_names(MODES), default=list(MODES), metavar="A,B",
        help="default: all that the case has")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default=default_device)
    add("--dtype", choices=list(DTYPES), default="bf16")
    add("--reference", type=_names(NAMES), metavar="A,B",
        default=["frozen", "bitsandbytes", "torch"],
        help="ratios are to the first of these that a case has")  # fmt: skip
    add("--seconds", type=float,
        help="measuring time of a case and mode; default: 3, with --short 1")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order of measurements")
    add("--json", type=Path, metavar="OUT", help="write the rows there")
    add("--list", action="store_true", help="list the cases and leave")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if no case matches or a result is wrong."""
    options = parser().parse_args(arguments)
    options.provider = options.provider or (SHORT_PROVIDERS if options.short else NAMES)
    if options.seconds is None:
        options.seconds = 1.0 if options.short else 3.0
    cases = select(options.device, options.case, short=options.short)
    if not cases:
        print(f"no case of device {options.device} matches {options.case!r}", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    # torch's remarks on captures and contexts; a pyfast kernel that is missing shows in the table.
    warnings.filterwarnings("ignore", module="torch|peft|transformers|bitsandbytes|unsloth")
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    clock, rng, common = Clock(device), random.Random(options.seed), facts(device)
    print(f"{common['device']}, torch {common['torch']}, pyfast {common['pyfast']}\n")
    rows: list[Row] = []
    for case in cases:
        for mode in (mode for mode in options.mode if mode in case.modes):
            found = [{**common, **row} for row in measure(case, mode, options, clock, rng)]
            print(table(found, options.reference) + "\n", flush=True)
            rows += found
            if options.json:  # after each case, so that an interrupted run keeps what it has
                write_rows(options.json, rows)
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
