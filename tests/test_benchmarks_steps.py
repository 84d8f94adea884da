# SPDX-License-Identifier: Apache-2.0
"""The training-step benchmarks on the CPU: methods and providers against the oracle, and what they hold."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cases, operands, providers, run, step_methods, timing, train_step
from tests.benchmark_runs import CPU, needs_peft, quick, rows_of, tiny  # noqa: F401

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quick")
PATHS = ["r4", "qlora", "sft", "p_tuning", "bottleneck", "ia3"]
WITHOUT_PEFT = ("sft", "bottleneck")


def operands_of(name: str) -> tuple[cases.Case, operands.Operands]:
    case = tiny(f"train_step/llama/{name}/2x8")
    (made,) = run.make_copies(case, "step", torch.float32, timing.Clock(CPU))
    return case, made


def test_every_method_is_a_case() -> None:
    for name in ["r16", *PATHS[1:]]:
        (case,) = cases.select("cuda", f"train_step/llama3_8b/{name}/2x4096")
        assert case.modes == ("step",)
        assert case.method in step_methods.METHODS
    for name in ("r16", "qlora"):
        for rest in ("2x4096/checkpointing", "1x1024"):
            assert cases.select("cuda", f"train_step/llama3_8b/{name}/{rest}")


@needs_peft
@pytest.mark.parametrize("name", [*PATHS, "r4/checkpointing", "qlora/checkpointing"])
def test_every_provider_agrees_with_the_oracle(tmp_path: Path, name: str) -> None:
    method, _, suffix = name.partition("/")
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    pattern = f"tiny/train_step/llama/{method}/2x8" + f"/{suffix}" * bool(suffix)
    rows = rows_of(tmp_path, "--case", pattern, "--dtype", "fp32")
    found = {row["provider"]: row for row in rows}
    for provider in ["torch", "pyfast", *(["peft"] if method not in WITHOUT_PEFT else [])]:
        row = found[provider]
        assert row["max_err"] < 1e-5
        assert (row["oracle"], row["mode"], row["liger"]) == ("fp32", "step", False)
        assert row["ms_p50"] > 0
        assert row["gbps"] is None
    if method == "sft":
        assert found["frozen"]["absent"] == "the floor of full fine-tuning is torch's own step"
    else:
        assert found["frozen"]["max_err"] is None
    if method in WITHOUT_PEFT:
        assert found["peft"]["absent"] == f"peft has no {method}"
    for provider in ("frozen_lt", "unsloth"):
        assert found[provider]["absent"] == f"{provider} needs a CUDA device"
    assert found["bitsandbytes"]["absent"] == "bitsandbytes is not measured in training steps"


@pytest.mark.parametrize("method", ["ia3", "bottleneck", "p_tuning", "sft"])
def test_unsloth_has_lora_alone(method: str) -> None:
    with pytest.raises(providers.Absent, match=f"unsloth has no {method}"):
        step_methods.find("unsloth", method)


@pytest.mark.parametrize("name", PATHS)
def test_providers_share_the_frozen_weights_and_train_their_own(name: str) -> None:
    case, shared = operands_of(name)
    before = {name: value.clone() for name, value in shared.model.state_dict().items()}
    losses = []
    for provider in ("torch", "pyfast"):
        step = providers.prepare(provider, case, "step", [shared]).step
        losses.append([step(0).item() for _ in range(3)])
        assert losses[-1][0] > losses[-1][1] > losses[-1][2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key, value in shared.model.state_dict().items():
        assert torch.equal(value, before[key])
        assert not value.requires_grad


@needs_peft
def test_qlora_holds_four_bits_and_the_floor_their_values() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from pyfast.nn import NF4Linear

    _, made = operands_of("qlora")
    classes = {"peft": bitsandbytes.nn.Linear4bit, "pyfast": NF4Linear}
    for provider, cls in classes.items():
        model = copy.deepcopy(made.model)
        step_methods.find(provider, "qlora")(model, made)
        for path, part in made.parts.items():
            base: Any = model.get_submodule(path).base_layer
            assert type(base) is cls
            assert torch.equal(base.weight.view(-1), part.packed.view(-1))
            assert base.weight.data_ptr() != part.packed.data_ptr()
    for path, part in made.parts.items():
        values = operands.decode(part).float()
        assert torch.equal(made.model.get_submodule(path).weight, values)


@pytest.mark.parametrize("provider", ["frozen", "torch", "pyfast"])
def test_steps_are_not_captured(provider: str) -> None:
    case, made = operands_of("ia3")
    prepared = providers.prepare(provider, case, "step", [made])
    assert not prepared.graphs
    assert prepared.keep is None


def test_bytes_that_are_shared() -> None:
    def shared(name: str, provider: str) -> int | None:
        case, made = operands_of(name)
        return providers.prepare(provider, case, "step", [made]).shared_bytes

    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    others = 2 * 96 * 64 + 5 * 64  # embeddings, output layer, norms
    assert shared("ia3", "frozen") == shared("ia3", "pyfast") == 4 * (linears + others)
    assert shared("p_tuning", "torch") == 4 * (linears + others)
    assert shared("qlora", "pyfast") == 4 * others
    assert shared("sft", "torch") == 0


def test_total_memory_is_what_a_provider_alone_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([100 << 20, 130 << 20])  # before a provider is prepared, and between its steps
    clock: Any = SimpleNamespace(cuda=True, allocated=lambda: next(levels))
    made = run.Prepared(lambda _: None, None, shared_bytes=7 << 20)
    monkeypatch.setattr(run, "prepare", lambda *_: made)
    monkeypatch.setattr(run, "transient_mib", lambda *_: 5.0)
    monkeypatch.setattr(run, "Subject", lambda *_: None)
    row: dict[str, Any] = {"provider": "pyfast", "mode": "step"}
    run.subject_of(row, tiny("train_step/llama/r4/2x8"), [None], "fp32", [], clock)  # type: ignore[list-item]
    assert (row["peak_mib"], row["total_mib"]) == (5.0, 30 + 7 + 5)


def test_work_of_a_step() -> None:
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    dense = 2 * 16 * (linears + 96 * 64)
    of = {name: tiny(f"train_step/llama/{name}/2x8").flops("step") for name in PATHS}
    assert of["ia3"] == 2 * dense
    assert of["sft"] == 3 * dense
    assert of["p_tuning"] == 2 * dense // 16 * 2 * (8 + 20)
    assert of["bottleneck"] == 2 * dense + 3 * 2 * 16 * 32 * (2 * 64) * 4  # behind four blocks


def test_the_floor_of_p_tuning_reads_the_virtual_tokens() -> None:
    class Model:
        embedding = nn.Embedding(96, 64)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embedding

        def __call__(self, inputs_embeds: Tensor, labels: Tensor) -> Any:
            self.seen = inputs_embeds.shape, labels
            return SimpleNamespace(loss=inputs_embeds.sum())

    model = Model()
    for name, virtual in (("p_tuning", 20), ("ia3", 0)):
        _, made = operands_of(name)
        train_step._frozen_step(model, made, 0)
        shape, labels = model.seen
        assert shape == (2, virtual + 8, 64)
        assert (labels[:, : virtual + 1] == step_methods.IGNORED).all()
        assert torch.equal(labels[:, virtual + 1 :], made.inputs["tokens"][:, 1:])
