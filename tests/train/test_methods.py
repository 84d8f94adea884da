# SPDX-License-Identifier: Apache-2.0
"""`finetune` with IA3, P-tuning and bottleneck adapters: trains, resumes, writes what is used afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pyfast
from pyfast.train.config import BottleneckOptions, OptimizerOptions, PromptOptions
from pyfast.train.loop import finetune
from pyfast.train.model import learned_positions, method_config
from pyfast.train.pretrained import load_pretrained
from tests.models import gpt2

METHODS = ["ia3", "p-tuning", "adapters"]


def options(method: str, **changes: Any) -> dict[str, Any]:
    """Small sizes, and dropout of no method."""
    return {
        "method": method,
        "prompt": PromptOptions(tokens=4, hidden=16),
        "bottleneck": BottleneckOptions(size=4),
        **changes,
    }


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_writes_an_adapter_that_is_used(
    make_config: Any, tiny_model: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetune(make_config(**options(method, steps=8, samples=1)))
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    out = capsys.readouterr().out
    assert f"Method: {method}" in out
    assert ("Merge it:" in out) is (method == "ia3")
    model, _ = load_pretrained(str(tiny_model), torch.float32, torch.device("cpu"))
    pyfast.load_adapter(model, result.weights, trainable=True)
    stored = load_file(result.weights / "adapter_model.safetensors")
    found = pyfast.adapter_state_dict(model)
    assert stored.keys() == found.keys()
    assert all(torch.allclose(stored[key], found[key], atol=1e-6) for key in stored)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_the_whole_run(
    make_config: Any, tmp_path: Path, interrupt: Any, method: str
) -> None:
    whole = finetune(make_config(**options(method, output_dir=str(tmp_path / "whole"))))
    config = make_config(**options(method, output_dir=str(tmp_path / "cut"), save_every=3))
    interrupt(config, step=4)
    torch.manual_seed(99)  # the process that resumes is in another state
    config.resume = True
    files = [finetune(config).weights, whole.weights]
    left, right = (load_file(file / "adapter_model.safetensors") for file in files)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_weight_decay_leaves_ia3_alone(make_config: Any, tmp_path: Path) -> None:
    """AdamW's decay would draw vectors that scale activations to zero."""
    files = []
    for name, decay in (("a", 0.0), ("b", 0.5)):
        config = make_config(**options("ia3", output_dir=str(tmp_path / name)))
        config.optimizer = OptimizerOptions(weight_decay=decay)
        files.append(load_file(finetune(config).weights / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_virtual_tokens_take_learned_positions(make_config: Any) -> None:
    model = gpt2()
    assert learned_positions(model) == 64
    pyfast.apply(model, method_config(make_config(**options("p-tuning"))))
    assert learned_positions(model) == 60


def test_options_reach_the_configs(make_config: Any) -> None:
    prompt = PromptOptions(tokens=7, encoder="nemo", hidden=12)
    found = method_config(make_config(**options("p-tuning", prompt=prompt)))
    assert found.num_virtual_tokens == 7
    assert found.encoder_reparameterization_type == "NEMO"
    assert found.encoder_hidden_size == 12
    bottleneck = BottleneckOptions(3, "pfeiffer", "relu", False, True)
    found = method_config(make_config(**options("adapters", bottleneck=bottleneck)))
    assert found == pyfast.BottleneckConfig(
        bottleneck_size=3,
        placement="pfeiffer",
        activation="relu",
        layer_norm=False,
        bias=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=found.base_model_name_or_path,
    )
