# SPDX-License-Identifier: Apache-2.0
"""Optimisers of a run: bitsandbytes' with their state in checkpoints, LoRA+, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

import pyfast
from pyfast.errors import ConfigError
from pyfast.train.config import AdapterOptions, OptimizerOptions
from pyfast.train.loop import finetune
from pyfast.train.model import method_config
from pyfast.train.optim import make_optimizer
from pyfast.train.validate import validate
from tests.models import llama


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def options(**changes: Any) -> dict[str, Any]:
    """Adapters large enough for bitsandbytes to keep their state in 8 bits."""
    return {"adapter": AdapterOptions(r=64, alpha=8), "dtype": "fp32", **changes}


@pytest.mark.parametrize("method", ["lora", "sft"])
def test_resumed_run_in_8_bits_is_the_whole_run(
    make_config: Any, tmp_path: Path, interrupt: Any, method: str
) -> None:
    optimizer = OptimizerOptions(name="adamw_8bit", weight_decay=0.01)
    run = options(method=method, optimizer=optimizer)
    whole = finetune(make_config(**run, output_dir=str(tmp_path / "whole")))
    config = make_config(**run, output_dir=str(tmp_path / "cut"), save_every=3)
    interrupt(config, step=4)
    stored = load_file(tmp_path / "cut" / "checkpoints" / "step-000003" / "training.safetensors")
    states = [t for name, t in stored.items() if name.startswith("optimizer.state1.")]
    assert any(state.dtype == torch.uint8 for state in states)
    torch.manual_seed(99)  # the process that resumes is in another state
    config.resume = True
    resumed = finetune(config)
    name = "model.safetensors" if method == "sft" else "adapter_model.safetensors"
    left, right = (load_file(result.weights / name) for result in (resumed, whole))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert resumed.eval_loss is not None
    assert resumed.eval_loss_before is not None
    assert resumed.eval_loss < resumed.eval_loss_before


def test_8_bits_train_as_bitsandbytes_does_alone(make_config: Any) -> None:
    """Oracle: the optimiser of bitsandbytes on the same gradients."""
    config = make_config(**options(optimizer=OptimizerOptions(name="adamw_8bit", lr=1e-2)))
    steps = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = pyfast.apply(llama(), method_config(config))
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if ours:
            optimizer = make_optimizer(config, model, parameters)
        else:
            optimizer = bitsandbytes.optim.AdamW8bit(parameters.values(), lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        steps.append(parameters)
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_embeddings_keep_32_bits(make_config: Any) -> None:
    config = make_config(method="sft", optimizer=OptimizerOptions(name="adamw_8bit"))
    model = llama()
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(config, model, parameters)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kinds = {n: optimizer.state[p]["state1"].dtype for n, p in parameters.items()}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert kinds["lm_head.weight"] == torch.uint8


@pytest.mark.parametrize(
    ("name", "fix"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "adamw")]
)
def test_paging_on_a_cpu_is_refused(make_config: Any, name: str, fix: str) -> None:
    config = make_config(optimizer=OptimizerOptions(name=name))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"run is on cpu\. Fix: --optimizer\.name {fix}$"):
        finetune(config)
    assert not Path(config.output_dir).exists()


def test_without_bitsandbytes(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config(optimizer=OptimizerOptions(name="adamw_8bit"))
    with pytest.raises(ConfigError, match=r"not installed\. Fix: pip install bitsandbytes"):
        finetune(config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_on_a_gpu(make_config: Any, tmp_path: Path, name: Any) -> None:
    optimizer = OptimizerOptions(name=name)
    config = make_config(**options(optimizer=optimizer), device="cuda", save_every=3)
    result = finetune(config)
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    # Going on from the checkpoint before the last gives the same weights.
    before = weights(result.weights)
    (tmp_path / "out" / "checkpoints" / "latest").write_text("step-000003\n")
    config.resume = True
    after = weights(finetune(config).weights)
    assert all(torch.allclose(after[key], before[key], atol=1e-5) for key in before)


def test_loraplus_rates_over_a_run(make_config: Any) -> None:
    """Oracle: runs of one step, in which AdamW moves each weight by its rate (B's gradient is not zero)."""
    moved = []
    for ratio in (None, 4.0):
        options = OptimizerOptions(lr=1e-3, loraplus_lr_ratio=ratio)
        out = f"ratio-{ratio}"
        config = make_config(optimizer=options, steps=1, accumulation=1)
        config.output_dir = str(Path(config.output_dir).with_name(out))
        found = weights(finetune(config).weights)
        moved.append({n: t for n, t in found.items() if "lora_B" in n})
    for name, tensor in moved[0].items():
        torch.testing.assert_close(moved[1][name], 4 * tensor)


def test_pissa_run_starts_with_the_base_and_resumes(make_config: Any, tmp_path: Path) -> None:
    adapter = AdapterOptions(r=4, alpha=8, init="pissa_niter_4")
    config = make_config(adapter=adapter, steps=4, save_every=2)
    result = finetune(config)
    plain = finetune(make_config(steps=1, output_dir=str(tmp_path / "plain")))
    assert result.eval_loss_before == pytest.approx(plain.eval_loss_before, abs=1e-4)
    before = weights(result.weights)
    (tmp_path / "out" / "checkpoints" / "latest").write_text("step-000002\n")
    config.resume = True
    after = weights(finetune(config).weights)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"adapter": AdapterOptions(init="olora")}, "adapter.init is 'olora'"),
        ({"adapter": AdapterOptions(init="pissa"), "method": "qlora"}, "rounds them to NF4 first"),
        (
            {"optimizer": OptimizerOptions(loraplus_lr_ratio=0)},
            "loraplus_lr_ratio is 0; it must be",
        ),
        (
            {"optimizer": OptimizerOptions(loraplus_lr_ratio=4), "method": "ia3"},
            "is for lora and qlora, but the method is ia3",
        ),
        ({"optimizer": OptimizerOptions(name="sgd")}, "optimizer.name is 'sgd'. Fix: one of adamw"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_go_together(make_config: Any, changes: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make_config(**changes))
    assert text in str(caught.value)
