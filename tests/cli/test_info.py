# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import pyfast
from pyfast import _extension
from pyfast.families import FAMILIES
from tests.cases import CASES
from tests.cli.conftest import Run


def kernels(out: str) -> dict[str, str]:
    """What serves, by "op on device"."""
    rows = re.findall(r"^  (\w+ on \w+)\s+(.*)$", out.partition("Kernels\n")[2], re.MULTILINE)
    return dict(rows)


def test_info_shows_every_part(run: Run) -> None:
    status, out, _ = run("info")
    assert status == 0
    for title in ("Build", "Devices", "Libraries", "Support", "Kernels"):
        assert f"{title}\n" in out
    support = out.partition("Support\n")[2].partition("Kernels\n")[0]
    for family in FAMILIES:
        (row,) = [line for line in support.splitlines() if line.startswith(f"  {family.name}  ")]
        assert all(method in row for method in ("SFT", "LoRA", "QLoRA"))


def test_every_op_is_served_on_every_kind_of_device(run: Run) -> None:
    rows = kernels(run("info")[1])
    for op in pyfast.ops.OPS:
        stem = op.removesuffix("_backward")
        for device in ("cpu", "cuda"):
            assert rows.get(f"{op} on {device}") or rows[f"{stem} on {device}"]


@pytest.mark.skipif(_extension.C is None, reason="the extension is not built")
def test_kernels_named_are_the_ones_that_run(run: Run) -> None:
    """Oracle: what the ops record when they run."""
    rows = kernels(run("info")[1])
    for case in CASES:
        arguments = case.make("cpu", torch.float32)
        with pyfast.ops.recorded_kernels() as ran:
            pyfast.ops.OPS[case.op].overload(*arguments)
        row = rows.get(f"{case.op} on cpu") or rows[f"{case.op.removesuffix('_backward')} on cpu"]
        compiled = {kernel for _, kernel in ran if kernel.endswith(("avx512", "avx2", "scalar"))}
        assert compiled <= set(re.findall(r"\w+", row)), str(case)


def test_parts_of_an_op_whose_kernels_are_for_another_device(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda = ({"name": f"k_{d}", "device": d, "reason": ""} for d in ("cpu", "cuda"))
    built = {"dropout": [cpu, cuda], "nf4_dequantize": [cpu, cuda], "lora_linear": [cuda]}
    facts = {"cuda": "", "cutlass": "", "compiler": "", "build_type": "", "cpu_isas": []}
    extension = SimpleNamespace(variants=lambda op: built.get(op, []), build_info=lambda: facts)
    monkeypatch.setattr(_extension, "C", extension)
    shown = kernels(run("info")[1])
    assert shown["lora_linear on cuda"] == "k_cuda"
    parts = "torch composition, with k_cpu for NF4 weights and k_cpu for dropout"
    assert shown["lora_linear on cpu"] == parts


def test_op_that_is_new_is_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    op = pyfast.ops.OPS["adapter_scale"]
    monkeypatch.setitem(pyfast.ops.OPS, "fresh", op)
    assert kernels(run("info")[1])["fresh on cpu"] == "torch composition"


@pytest.mark.skipif(_extension.C is None, reason="the extension is not built")
def test_without_cuda_kernels_all_ops_say_so_in_the_same_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_extension, "has_cuda", lambda: False)
    rows = kernels(run("info")[1])
    assert {row for name, row in rows.items() if name.endswith(" on cuda")} == {
        "torch reference (this build has no CUDA kernels)"
    }


def test_ops_whose_kernels_are_listed_with_another_op(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the extension: what LoRA's kernels are built for serves groups and backwards."""
    facts = {"cuda": "13", "cuda_architectures": [], "cutlass": "", "compiler": "", "build_type": "",
             "cpu_isas": []}  # fmt: skip

    def variants(op: str) -> list[dict[str, str]]:
        if op != "lora_linear":
            raise ValueError(op)
        return [{"name": "lora_linear_sm90", "device": "cuda", "reason": ""}]

    extension = SimpleNamespace(variants=variants, build_info=lambda: facts)
    monkeypatch.setattr(_extension, "C", extension)
    shown = kernels(run("info")[1])
    assert shown["lora_group on cuda"] == shown["lora_linear on cuda"] == "lora_linear_sm90"
    assert "lora_linear_backward on cuda" not in shown


def test_without_the_extension_torch_serves_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "C", None)
    monkeypatch.setattr(_extension, "reason", "not built")
    rows = kernels(run("info")[1])
    assert set(rows.values()) == {"torch reference (the extension is missing)"}
