# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyfast.cli import main
from pyfast.errors import (
    CheckpointCorruptError,
    ConfigError,
    EmptyTargetError,
    NoGradientError,
    NonFiniteError,
    PyfastError,
    ResumeError,
)
from pyfast.train import finetune
from pyfast.train import loop as loop_module
from pyfast.train.command import program
from pyfast.train.config import (
    AdapterOptions,
    DatasetOptions,
    FinetuneConfig,
    ScheduleOptions,
)
from pyfast.train.data import load_data
from pyfast.train.loop import Trainer, learning_rate
from pyfast.train.model import choose_place, prepare_model, trainable_parameters
from pyfast.train.run import seed_everything


def rates(total: int, schedule: ScheduleOptions) -> list[float]:
    return [learning_rate(step, total, 1.0, schedule) for step in range(total)]


def test_schedule_values() -> None:
    linear = rates(10, ScheduleOptions("linear", warmup_fraction=0.2, min_ratio=0.2))
    assert linear == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    cosine = rates(9, ScheduleOptions("cosine", warmup_fraction=0.1, min_ratio=0.0))
    assert cosine == pytest.approx(
        [1.0, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(1, 9))]
    )
    assert rates(4, ScheduleOptions("constant", warmup_fraction=0.5)) == [0.5, 1, 1, 1]
    assert rates(1, ScheduleOptions("cosine", warmup_fraction=0.0, min_ratio=0.1)) == pytest.approx(
        [0.1]
    )


def make_trainer(config: FinetuneConfig) -> Trainer:
    place = choose_place(config.run)
    seed_everything(config.run.seed)
    model, tokenizer = prepare_model(config, place)
    parameters = trainable_parameters(model)
    data = load_data(config, tokenizer)
    assert config.output_dir is not None
    return Trainer(config, place, model, tokenizer, parameters, data, Path(config.output_dir))


@pytest.mark.parametrize("method", ["lora", "sft", "qlora"])
def test_accumulation_is_the_big_batch(make_config: Any, method: str) -> None:
    """Answers differ in length, so a mean of means would differ by far more than rounding."""
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        config = make_config(method=method, batch_size=batch_size, accumulation=accumulation)
        config.adapter.dropout = 0.0
        trainer = make_trainer(config)
        values = [trainer.step() for _ in range(2)]
        results.append([(row["loss"], row["grad_norm"]) for row in values])
    for other in results[1:]:
        torch.testing.assert_close(
            torch.tensor(other), torch.tensor(results[0]), rtol=2e-5, atol=1e-7
        )


def test_loss_is_the_models_own(make_config: Any, tiny_model: Path) -> None:
    """Oracle: transformers' loss on each record by itself, weighted by its number of answer tokens."""
    config = make_config(batch_size=4, accumulation=1)
    trainer = make_trainer(config)
    items = trainer.data.train.items
    first = [items[i] for i in loop_module.step_indices(trainer.lengths, 4, 0, 0)]
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    total = count = 0.0
    for item in first:
        ids = torch.tensor(item.tokens[None].astype("int64"))
        labels = torch.where(torch.from_numpy(item.learned), ids, -100)
        with torch.no_grad():
            total += float(reference(input_ids=ids, labels=labels).loss) * item.num_targets
        count += item.num_targets
    assert trainer.step()["loss"] == pytest.approx(total / count, rel=1e-5)


def weights(output: Path) -> dict[str, torch.Tensor]:
    files = [
        output / "adapter" / "adapter_model.safetensors",
        output / "model" / "model.safetensors",
    ]
    return load_file(next(file for file in files if file.exists()))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def losses(output: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["lr"]) for row in rows if "loss" in row]


class StopAfter:
    """Stands for a signal that comes during a step: the run stops when that step is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        original = Trainer.step

        def step_and_stop(trainer: Trainer) -> dict[str, float]:
            values = original(trainer)
            if trainer.progress.step == step:
                import signal

                signal.raise_signal(signal.SIGINT)
            return values

        monkeypatch.setattr(Trainer, "step", step_and_stop)


# 36 training records in steps of 4: an epoch ends after step 9.
@pytest.mark.parametrize("method", ["lora", "qlora", "sft"])
@pytest.mark.parametrize("cut", [1, 5, 9, 11])
def test_resumed_run_equals_the_uninterrupted_one(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, cut: int
) -> None:
    options: dict[str, Any] = {"method": method, "steps": 12, "eval_every": 4}
    finetune(make_config(**options, output_dir=str(tmp_path / "whole")))
    config = make_config(**options, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        StopAfter(patch, cut)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    seed_everything(99)  # the process that resumes is in another state
    config.resume = True
    result = finetune(config)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "cut")) == result.steps == 12


def test_resume_refuses_another_run(make_config: Any, tmp_path: Path, data_file: Path) -> None:
    config = make_config(steps=2)
    finetune(config)
    output = Path(config.output_dir)
    with pytest.raises(
        ConfigError, match=r"already holds a run \(newest checkpoint: step-000002\)"
    ):
        finetune(config)
    config.resume = True
    config.optimizer.lr = 0.5
    with pytest.raises(ResumeError, match=r"optimizer\.lr \(saved None, now 0\.5\)"):
        finetune(config)
    config.optimizer.lr = None
    config.data = str(tmp_path / "other.jsonl")
    Path(config.data).write_text(data_file.read_text().replace("what", "who"))
    with pytest.raises(ResumeError, match="data "):
        finetune(config)
    config.data = str(data_file)
    before = weights(output)
    assert finetune(config).steps == 2  # nothing is left to do, and nothing changes
    assert same(before, weights(output))


@pytest.mark.parametrize("method", ["lora", "qlora", "sft"])
def test_run_of_another_length_is_refused_with_the_way_on(
    make_config: Any, tmp_path: Path, method: str
) -> None:
    """The way on works: the commands of the message train further."""
    config = make_config(method=method, steps=2)
    output = finetune(config).output_dir
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    config.resume = True
    config.run.steps = 4
    with pytest.raises(ResumeError) as caught:
        finetune(config)
    text = str(caught.value)
    assert "belongs to a run of run.steps 2, this asks for run.steps 4;" in text
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    onward = text.partition("from these weights: ")[2]
    model = str(tmp_path / "merged")
    if method == "sft":
        model = onward.removeprefix(f"{program()} finetune --model ")
    else:
        merge = onward.partition(", then")[0].replace("MERGED", model)
        assert main(shlex.split(merge.removeprefix(f"{program()} "))) == 0
        assert onward.endswith(f"then {program()} finetune --model MERGED")
    assert finetune(make_config(model=model, output_dir=str(tmp_path / "more"))).steps == 6
    with pytest.raises(ResumeError, match=r"run\.steps 2, this asks for run\.epochs 3;"):
        finetune(replace(config, run=replace(config.run, steps=None, epochs=3)))


def test_another_method_is_named_before_another_length(make_config: Any) -> None:
    output = str(finetune(make_config(method="qlora", steps=1)).output_dir)
    other = make_config(method="lora", steps=2, output_dir=output)
    with pytest.raises(ResumeError, match="method"):
        finetune(replace(other, resume=True))


def test_resume_of_a_finished_run_changes_no_weight(make_config: Any) -> None:
    config = make_config(steps=2)
    first = finetune(config)
    before = weights(first.output_dir)
    again = finetune(replace(config, resume=True))
    assert again.steps == 2
    assert again.eval_loss == first.eval_loss
    assert same(before, weights(again.output_dir))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "{here}/nothing"},
        {"data": "{here}/bad.jsonl"},
        {"data": "{here}/few.jsonl"},
        {"data": "{here}/nothing.jsonl"},
        {"dataset": DatasetOptions(max_length=2)},
        {"adapter": AdapterOptions(targets=["no_such_layer"])},
        {"device": "tpu"},
        {"steps": 0},
        {"output_dir": "{here}/few.jsonl/below"},
    ],
    ids=str,
)
def test_run_that_fails_before_its_first_step_leaves_nothing(
    make_config: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = sorted(tmp_path.iterdir())
    changes = {
        name: value.format(here=tmp_path) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(PyfastError):
        finetune(make_config(**{"output_dir": str(tmp_path / "new" / "out"), **changes}))
    assert sorted(tmp_path.iterdir()) == before


def test_directory_that_cannot_be_written_is_told_first(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"'{tmp_path}' is not yours to write in"):
        finetune(make_config(model="nothing"))


def test_resume_names_a_damaged_checkpoint(make_config: Any) -> None:
    config = make_config(steps=2)
    finetune(config)
    file = (
        Path(config.output_dir)
        / "checkpoints"
        / "step-000002"
        / "adapter"
        / "adapter_model.safetensors"
    )
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    config.resume = True
    with pytest.raises(
        CheckpointCorruptError, match=r"adapter_model\.safetensors': SHA-256 differs"
    ):
        finetune(config)


@pytest.mark.parametrize("method", ["lora", "sft"])
def test_what_a_run_leaves_behind(make_config: Any, tiny_model: Path, method: str) -> None:
    config = make_config(method=method, steps=8, samples=2, eval_every=4, save_every=4)
    config.optimizer.lr = 5e-3
    result = finetune(config)
    output = result.output_dir
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    assert result.loss_curve.read_bytes()[:4] == b"\x89PNG"
    assert [set(row) for row in result.samples] == [{"prompt", "reference", "before", "after"}] * 2
    assert list((output / "tensorboard").iterdir())
    assert (output / "checkpoints" / "latest").read_text() == "step-000008\n"
    assert not list(output.glob(".tmp*"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8]
    assert set(rows[1]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}

    # What is written, others read: held-out loss from files alone.
    if method == "sft":
        model = AutoModelForCausalLM.from_pretrained(result.weights)
        AutoTokenizer.from_pretrained(result.weights)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model), result.weights
        )
    held = load_data(config, AutoTokenizer.from_pretrained(tiny_model)).evaluation
    total = 0.0
    for item in held.items:
        ids = torch.tensor(item.tokens[None].astype("int64"))
        labels = torch.where(torch.from_numpy(item.learned), ids, -100)
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * item.num_targets
    assert total / held.num_learned == pytest.approx(result.eval_loss, rel=1e-5)


def test_activation_checkpointing_changes_nothing(make_config: Any, tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        finetune(make_config(steps=3, activation_checkpointing=on, output_dir=str(tmp_path / name)))
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-6)


def test_bf16_full_fine_tuning_keeps_fp32_weights(make_config: Any) -> None:
    result = finetune(make_config(method="sft", dtype="bf16", steps=2))
    assert {tensor.dtype for tensor in weights(result.output_dir).values()} == {torch.float32}


def test_non_finite_loss_stops_before_weights_change(make_config: Any) -> None:
    trainer = make_trainer(make_config())
    trainer.step()
    name = next(name for name in trainer.parameters if "layers.1.mlp.up_proj.lora_B" in name)
    with torch.no_grad():
        trainer.parameters[name][3, 1] = math.nan
    before = {key: value.detach().clone() for key, value in trainer.parameters.items()}
    with pytest.raises(NonFiniteError) as caught:
        trainer.step()
    text = str(caught.value)
    assert "step 2: the loss is nan; first non-finite output: model.layers.1.mlp.up_proj" in text
    assert "as after step 1; last checkpoint: none" in text
    for key, value in trainer.parameters.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
        assert value.grad is None


def test_non_finite_gradient_stops_before_weights_change(make_config: Any) -> None:
    trainer = make_trainer(make_config())
    parameter = next(iter(trainer.parameters.values()))
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = {key: value.detach().clone() for key, value in trainer.parameters.items()}
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient's norm is (nan|inf)"):
        trainer.step()
    assert all(torch.equal(before[key], value) for key, value in trainer.parameters.items())
    assert not trainer.optimizer.state


def test_nothing_trainable(make_config: Any) -> None:
    trainer = make_trainer(make_config())
    for parameter in trainer.parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(NoGradientError, match=r"0 of \d+ parameters of LlamaForCausalLM"):
        trainable_parameters(trainer.model)
    unused = torch.nn.Parameter(torch.zeros(1))
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(True)
    trainer.parameters = {"unused": unused}
    with pytest.raises(NoGradientError, match="none of 1 trainable tensors has a gradient"):
        trainer.step()


def test_model_that_does_not_exist(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a directory here"):
        finetune(make_config(model=str(tmp_path / "nothing")))


@pytest.mark.parametrize("device", ["tpu", "meta"])
def test_device_that_computes_nothing(make_config: Any, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.device is '{device}'"):
        finetune(make_config(device=device))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(
    make_config: Any, tmp_path: Path
) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(EmptyTargetError, match="no record is left to train on"):
        finetune(make_config(data=str(data)))
