# SPDX-License-Identifier: Apache-2.0
"""The LoRA benchmarks on the CPU: cases, providers against the oracles, tuning."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import adapters, cases, lora, operands, prepared, providers, run, timing, tune_gemm
from benchmarks.blocks import Block
from pyfast import ops
from tests.benchmark_runs import CPU, needs_peft, quick, rows_of, tiny  # noqa: F401

BLOCKS = ["lora_qkv", "lora_mlp", "lora_layer"]
pytestmark = pytest.mark.usefixtures("quick")


# --- cases --------------------------------------------------------------------------------------


def test_every_shape_rank_and_dropout_is_a_case() -> None:
    names = {case.name for case in cases.all_cases("cuda")}
    shapes = ["4096x4096", "14336x4096", "4096x14336", "1024x4096", "6144x4096"]
    ranks, rows = (8, 16, 64, 128), (512, 2048, 8191, 8192, 16384)
    for r, m in itertools.product(ranks, rows):
        for shape in shapes:
            assert {f"lora_linear/dense/{shape}/r{r}/m{m}{p}" for p in ("", "/p0.1")} <= names
        for block, p in itertools.product(("lora_qkv", "lora_mlp"), ("", "/p0.1")):
            assert f"{block}/r{r}/m{m}{p}" in names
    assert {"lora_layer/r16/m8192", "lora_layer/r128/m8192", "lora_layer/nf4/r16/m8192"} <= names
    assert {f"lora_linear/nf4/4096x4096/r16/m{m}" for m in (512, 2048, 8192)} <= names
    for m, n in itertools.product((1024, 2048, 4096, 8192), (4096, 14336)):
        (case,) = cases.select("cuda", f"nf4_linear/nested/{n}x4096/m{m}")
        assert case.modes == ("fwd", "fwdbwd")


def test_counts_of_a_block() -> None:
    case = tiny("lora_qkv/r8/m4")
    products = 64 * 64 + 2 * 32 * 64
    assert case.flops("fwd") == 2 * 4 * (products + 8 * (128 + 2 * 96))
    x, y, factors = 4 * 64, 4 * 128, 8 * (128 + 2 * 96)
    assert case.bytes("fwd", 2) == 2 * (products + x + y + factors)
    assert case.bytes("fwdbwd", 2) == 2 * (2 * products + 3 * x + 2 * y + 3 * factors)


def test_what_a_layer_reads_and_writes() -> None:
    case = tiny("lora_layer/r8/m4")
    assert case.inputs == {"x": 64, "attended": 64, "normed": 64, "hidden": 128}
    assert case.outputs == [64, 32, 32, 64, 128, 128, 64]
    assert tiny("lora_mlp/r8/m4").inputs == {"x": 64}
    assert tiny("lora_mlp/r8/m4").outputs == [64]
    step = tiny("train_step/llama/r4/2x8")
    assert [linear.path for linear in step.linears][6:8] == [
        "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


# --- providers ----------------------------------------------------------------------------------


@needs_peft
@pytest.mark.parametrize(
    "name",
    [
        "lora_linear/dense/64x128/r8/m4",
        "lora_linear/nf4/64x128/r8/m4",
        *(f"{b}/r8/m4" for b in BLOCKS),
        "lora_layer/nf4/r8/m4",
    ],
)
def test_every_provider_agrees_with_the_oracle(tmp_path: Path, name: str) -> None:
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    asked = "frozen,torch,peft,unsloth,bitsandbytes,pyfast"
    rows = rows_of(
        tmp_path, "--case", f"tiny/{name}", "--mode", "fwdbwd", "--dtype", "fp32", "--provider", asked
    )  # fmt: skip
    found = {row["provider"]: row for row in rows}
    assert found["frozen"]["max_err"] is None
    for provider in ("torch", "peft", "pyfast"):
        assert found[provider]["max_err"] < 1e-5
    assert found["unsloth"]["absent"] == "Unsloth needs a CUDA device"
    assert "bitsandbytes has no lora_" in found["bitsandbytes"]["absent"]
    assert "reference" in found["pyfast"]["kernel"]


@needs_peft
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_dropout_is_compared_with_the_mask_that_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    options = ["--case", "tiny/lora_*/p0.1", "--mode", mode, "--dtype", "fp32"]
    rows = rows_of(tmp_path, *options, "--provider", "torch,peft,pyfast")
    assert len(rows) == 3 * 3
    for row in rows:
        # Sixteen bits of probability, so 1 / (1 - p) is 1e-5 off.
        assert row["max_err"] < 2e-5
    dropped = ops.lora_linear
    twice = functools.partial(dropped, dropout=0.2)
    monkeypatch.setattr(ops, "lora_linear", lambda *args, dropout, **rest: twice(*args, **rest))
    assert run.main(["--device", "cpu", "--seconds", "0", *options, "--provider", "pyfast"]) == 1


@needs_peft
def test_compiled_peft_agrees_and_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = ["--provider", "peft_compile", "--mode", "fwdbwd", "--dtype", "fp32"]
    (row,) = rows_of(tmp_path, "--case", "tiny/lora_qkv/r8/m4", *options)
    assert row["max_err"] < 1e-5
    rows = rows_of(tmp_path, "--case", "tiny/lora_linear/*", *options)
    found = {row["case"].split("8/m4")[-1] + row["case"].split("/")[2]: row for row in rows}
    assert found["dense"]["max_err"] < 1e-5
    assert found["/p0.1dense"]["max_err"] is None
    assert found["nf4"]["absent"] == "PEFT is compiled over dense weights only"


@pytest.mark.parametrize(("name", "groups"), [("lora_qkv", 1), ("lora_layer", 2), ("lora_mlp", 1)])
def test_blocks_get_our_groups(name: str, groups: int) -> None:
    case = tiny(f"{name}/r8/m4")
    copies = run.make_copies(case, "fwdbwd", torch.float32, timing.Clock(CPU))
    step = providers.prepare("pyfast", case, "fwdbwd", copies).step
    with ops.recorded_kernels() as names:
        step(0)
    assert [op for op, _ in names].count("lora_group") == groups


class _Apply:
    """Unsloth's entry points in plain torch; what they were called with is in `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def _lora(self, layer: Any, x: Tensor) -> Tensor:
        assert x.dim() == 3
        low = F.linear(x, layer.lora_A["default"].weight)
        y = F.linear(x, layer.base_layer.weight)
        return y + layer.scaling["default"] * F.linear(low, layer.lora_B["default"].weight)

    def apply_lora_o(self, owner: Any, x: Tensor) -> Tensor:
        self.calls.append(("o", None))
        return self._lora(owner.o_proj, x)

    def apply_lora_qkv(self, owner: Any, x: Tensor, inplace: bool) -> tuple[Tensor, ...]:
        self.calls.append(("qkv", inplace))
        return tuple(self._lora(p, x) for p in (owner.q_proj, owner.k_proj, owner.v_proj))

    def apply_lora_mlp_swiglu(self, owner: Any, x: Tensor, inplace: bool) -> Tensor:
        self.calls.append(("mlp", inplace))
        gate, up = self._lora(owner.gate_proj, x), self._lora(owner.up_proj, x)
        return self._lora(owner.down_proj, F.silu(gate) * up)


@needs_peft
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("lora_linear/dense/64x128/r8/m4", [("o", None)]),
        ("lora_qkv/r8/m4", [("qkv", False)]),
        ("lora_mlp/r8/m4", [("mlp", False)]),
        ("lora_layer/r8/m4", [("qkv", False), *[("o", None)] * 4]),
    ],
)
def test_unsloths_kernels_serve_what_they_can(
    monkeypatch: pytest.MonkeyPatch, name: str, calls: list[tuple[str, Any]]
) -> None:
    kernels = _Apply()
    monkeypatch.setattr(adapters, "_unsloth_kernels", lambda: kernels)
    monkeypatch.setattr(adapters, "need", lambda package: None)
    monkeypatch.setattr(lora, "need_cuda", lambda what, tensor: None)
    case = tiny(name)
    copies = run.make_copies(case, "fwdbwd", torch.float32, timing.Clock(CPU))
    made = providers.prepare("unsloth", case, "fwdbwd", copies)
    error = operands.relative_error(made.read(made.step(0)), operands.oracle(copies[0], "fwdbwd"))
    assert error < 1e-5
    assert kernels.calls == calls


@needs_peft
def test_unsloth_that_cannot_be_imported_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_unsloth_kernels", lambda: NotImplementedError("no GPU"))
    monkeypatch.setattr(adapters, "need", lambda package: None)
    with pytest.raises(prepared.Absent, match="cannot be imported: no GPU"):
        adapters.unsloth(Block("lora_linear", {}), {})


# --- tuning -------------------------------------------------------------------------------------


def test_the_table_chooses_from_plain_kernels() -> None:
    names = [
        "gemm_sm90_128x256_2x1",
        "gemm_sm90_128x256_2x1_masked",
        "gemm_sm90_2x1_making_16",
        "gemm_sm90_128x256_2x1_scaled",
        "x",
        "gemm_sm80_128x256",
    ]
    assert tune_gemm.tuned_kernels(names) == [0, 4]


def test_the_tuning_calls_the_kernel_as_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    extension = SimpleNamespace(
        C=SimpleNamespace(lora_gemm=lambda *args: called.append(args)),
        DTYPES={torch.bfloat16: 2}, stream=lambda index: 7,
    )  # fmt: skip
    monkeypatch.setattr(tune_gemm, "_extension", extension)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device, dtype: randn(*size, dtype=dtype))
    tune_gemm.Operands(True, 32, 64, 48).ours((1, 4, True))
    binding = (Path(__file__).parent.parent / "csrc/bindings/lora.cpp").read_text()
    arguments = binding[binding.index("void gemm(") :].split(") {")[0].split("(", 1)[1].split(",")
    assert len(called[0]) == len(arguments)
    values = {name.split()[-1]: value for name, value in zip(arguments, called[0], strict=True)}
    assert {name: values[name] for name in ("m", "n", "k", "kernel", "swizzle", "along_n")} == {
        "m": 32, "n": 48, "k": 64, "kernel": 1, "swizzle": 4, "along_n": True,
    }  # fmt: skip
    assert not any(values[name] for name in ("bias", "blocks", "q", "workspace", "counters"))
