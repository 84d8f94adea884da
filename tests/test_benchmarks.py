# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner, end to end on the CPU."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import cases, compare, machine, operands, prepared, providers, run, timing
from pyfast import ops

KEYS = {
    "schema", "case", "provider", "mode", "shape", "dtype", "ms_p50", "ms_p20", "ms_p80", "tflops",
    "gbps", "peak_mib", "max_err", "kernel", "device", "driver", "cuda", "torch", "pyfast", "trees",
}  # fmt: skip


def rows_of(tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "out.json"
    assert run.main(["--device", "cpu", "--seconds", "0", "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(timing, "BURST_SECONDS", 0.0)


def test_a_run_gives_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(
        tmp_path, "--case", "tiny/nf4_linear/nested/*", "--provider", "frozen,peft,pyfast"
    )
    measured = [row for row in rows if "absent" not in row]
    assert [(row["provider"], row["mode"]) for row in measured] == [
        ("frozen", "fwd"), ("pyfast", "fwd"), ("frozen", "fwdbwd"), ("pyfast", "fwdbwd"),
    ]  # fmt: skip
    for row in measured:
        assert row.keys() >= KEYS
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["max_err"] < 0.02
        assert row["graph_ms_p50"] is None
        assert row["rounds"] == 2
    assert "nf4_dequantize" in measured[1]["kernel"] or measured[1]["kernel"] == "reference"
    assert measured[0]["kernel"] is None
    text = capsys.readouterr().out
    assert "tiny/nf4_linear/nested/64x128/m4  fwdbwd  bf16  m=4 n=64 k=128" in text
    assert "absent: peft (peft has no nf4_linear)" in text


@pytest.mark.parametrize("pattern", ["tiny/nf4_quantize/*", "tiny/nf4_dequantize/*"])
def test_pyfast_equals_bitsandbytes(tmp_path: Path, pattern: str) -> None:
    pytest.importorskip("bitsandbytes")
    rows = rows_of(tmp_path, "--case", pattern, "--provider", "pyfast")
    assert [(row["oracle"], row["max_err"]) for row in rows] == [("bitsandbytes", 0.0)] * 2


def test_dropout_is_compared_where_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path, "--case", "tiny/dropout/*", "--provider", "torch,pyfast")
    assert [(row["provider"], row["mode"]) for row in rows] == [
        ("torch", "fwd"), ("pyfast", "fwd"), ("torch", "fwdbwd"), ("pyfast", "fwdbwd"),
    ]  # fmt: skip
    assert all(row["max_err"] < 0.01 for row in rows)
    for wrong in (lambda x, p: x * 0, lambda x, p: x, lambda x, p: ops.dropout(x, p) * 1.2):
        monkeypatch.setattr(torch.nn.functional, "dropout", wrong)
        options = ["--device", "cpu", "--seconds", "0", "--case", "tiny/dropout/*"]
        assert run.main([*options, "--provider", "torch"]) == 1


def test_a_wrong_result_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(case: cases.Case, mode: str, copies: list[operands.Operands]) -> prepared.Prepared:
        return prepared.Prepared(lambda i: [torch.zeros_like(copies[i].w)], list)

    monkeypatch.setitem(providers.PROVIDERS, "pyfast", zeros)
    options = ["--device", "cpu", "--seconds", "0", "--case", "tiny/nf4_dequantize/flat/*"]
    assert run.main(options) == 1
    assert "WRONG" in capsys.readouterr().out


def test_an_error_of_a_peer_is_said_and_one_of_ours_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(case: cases.Case, mode: str, copies: list[operands.Operands]) -> prepared.Prepared:
        raise RuntimeError("no kernel\nfor this card")

    options = ["--case", "tiny/nf4_dequantize/flat/*", "--provider"]
    monkeypatch.setitem(providers.PROVIDERS, "torch", fails)
    (row,) = rows_of(tmp_path, *options, "torch")
    assert row["absent"] == "RuntimeError: no kernel"
    monkeypatch.setitem(providers.PROVIDERS, "pyfast", fails)
    with pytest.raises(RuntimeError, match="no kernel"):
        run.main(["--device", "cpu", *options, "pyfast"])


def test_no_match_and_unknown_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--case", "nothing/*"]) == 1
    assert "no case of device cpu matches 'nothing/*'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--provider", "nobody"])
    assert "'nobody' is not one of frozen" in capsys.readouterr().err


def test_tiny_cases_are_only_run_by_name() -> None:
    assert not any(case.name.startswith("tiny/") for case in cases.select("cpu", "*"))
    assert all(case.name.startswith("tiny/") for case in cases.select("cpu", "tiny/*"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_case_names_are_unique(device: str) -> None:
    names = [case.name for case in cases.all_cases(device)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_short_set(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", device, "--short", "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert set(listed) < {case.name for case in cases.select(device, "*")}
    for glob in cases.SHORT[device]:
        assert fnmatch.filter(listed, glob), f"{glob} matches no case"
    assert set(run.SHORT_PROVIDERS) < set(providers.NAMES)


def test_missing_package_is_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared.importlib.util, "find_spec", lambda name: None)
    case = cases.select("cpu", "tiny/nf4_quantize/flat/*")[0]
    with pytest.raises(prepared.Absent, match="bitsandbytes is not installed"):
        providers.prepare("bitsandbytes", case, "fwd", [])


@pytest.mark.parametrize(
    ("values", "q", "want"),
    [([], 0.5, None), ([3.0], 0.2, 3.0), ([1.0, 2.0, 4.0], 0.5, 2.0), ([1.0, 2.0], 0.25, 1.25)],
)
def test_quantile(values: list[float], q: float, want: float | None) -> None:
    assert timing.quantile(values, q) == want


def test_relative_error_is_of_the_largest_value_and_never_hides_nan() -> None:
    want = [torch.tensor([0.0, 4.0])]
    assert operands.relative_error([torch.tensor([0.0, 3.0])], want) == 0.25
    assert operands.relative_error([torch.tensor([0.0, math.nan])], want) == math.inf
    assert operands.relative_error([torch.tensor([0.0])], want) == math.inf


def test_counts_of_a_known_case() -> None:
    case = cases.Case("x", "lora_linear", (), {"m": 2, "n": 3, "k": 5, "r": 1}, ("fwd",))
    assert case.flops("fwd") == 2 * 2 * 3 * 5 + 2 * 2 * 1 * (3 + 5)
    weights = cases.Case("x", "nf4_dequantize", (), {"n": 64, "k": 64}, nf4=True)
    assert weights.bytes("fwd", 2) == 64 * 64 // 2 + 64 * 4 + 64 * 64 * 2


def test_compare_flags_what_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(name: str, milliseconds: float, device: str = "a") -> str:
        row = {"case": "c", "mode": "fwd", "dtype": "bf16", "provider": "pyfast", "device": device}
        run.write_rows(tmp_path / name, [{**row, "burst_ms_p50": milliseconds}])
        return str(tmp_path / name)

    old, same, slow = file("old", 1.0), file("same", 1.01), file("slow", 1.2, "b")
    assert compare.main([old, same]) == 0
    assert compare.main([old, slow]) == 1
    assert compare.main([old, slow, "--threshold", "1.3"]) == 0
    text = capsys.readouterr().out
    assert "1.200  slower" in text
    assert "different devices: a, b" in text
    assert compare.main([old, slow, "--provider", "torch"]) == 1


def test_compare_of_one_file_gives_ratios_to_the_better_frozen_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {
        ("frozen", "fwd"): 1.0, ("frozen", "fwdbwd"): 4.0,
        ("frozen_lt", "fwd"): 2.0, ("frozen_lt", "fwdbwd"): 3.0,
        ("pyfast", "fwd"): 1.1, ("pyfast", "fwdbwd"): 3.5,
        ("peft", "fwd"): 1.5,
    }  # fmt: skip
    row = {"case": "c", "dtype": "bf16", "device": "a"}
    rows = [
        {**row, "provider": provider, "mode": mode, "burst_ms_p50": time}
        for (provider, mode), time in times.items()
    ]
    rows.append({**row, "case": "step", "mode": "step", "provider": "frozen", "burst_ms_p50": 2.0})
    rows.append({**row, "case": "step", "mode": "step", "provider": "pyfast", "burst_ms_p50": 2.1})
    rows.append({**row, "case": "t", "mode": "step", "provider": "torch", "burst_ms_p50": 2.0})
    rows.append({**row, "case": "t", "mode": "step", "provider": "pyfast", "burst_ms_p50": 1.0})
    rows.append({**row, "case": "u", "mode": "step", "provider": "pyfast", "burst_ms_p50": 1.0})
    run.write_rows(tmp_path / "rows", rows)
    assert compare.main([str(tmp_path / "rows")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["c", "peft", "1.500", "-", "-", "-"],
        ["c", "pyfast", "1.100", "1.200", "1.167", "-"],  # 2.4 over 2.0: floors 1.0 and 3.0
        ["step", "pyfast", "-", "-", "-", "1.050"],
        ["t", "pyfast", "-", "-", "-", "0.500"],  # no frozen layer: torch
    ]
    assert compare.main([str(tmp_path / "rows"), "--provider", "pyfast"]) == 0
    text = capsys.readouterr().out
    assert "peft" not in text
    assert "0.500" in text


def test_tree_hash_is_gits(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    source = tmp_path / "source"
    for name, text in {"b.py": "b\n", "a/c.h": "c\n", "a.txt": "", "a0": "x"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    commands = (["init", "--quiet"], ["add", "--all"], ["write-tree"])
    for command in commands:
        done = subprocess.run(
            [git, *command], cwd=source, capture_output=True, text=True, check=True
        )
    shutil.rmtree(source / ".git")
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "b.pyc").write_bytes(b"compiled")
    (source / "_C.so").write_bytes(b"compiled")
    assert machine.tree_hash(source) == done.stdout.strip()


def test_trees_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(len(value) == 40 for value in machine.trees().values())
    monkeypatch.setenv(machine.TREES_VARIABLE, "csrc=1,pyfast=2")
    assert machine.trees() == {"csrc": "1", "pyfast": "2"}
