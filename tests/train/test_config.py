# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import yaml

from pyfast.errors import ConfigError
from pyfast.train.config import FinetuneConfig, to_dict
from pyfast.train.validate import validate


def test_defaults_are_valid() -> None:
    validate(FinetuneConfig())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("method", "dora"),
        ("adapter.r", 0),
        ("adapter.r", True),
        ("adapter.alpha", math.nan),
        ("adapter.dropout", 1.0),
        ("dataset.max_length", 1),
        ("dataset.eval_fraction", 1.0),
        ("dataset.split_by", "answer"),
        ("dataset.on_bad_record", "ignore"),
        ("optimizer.lr", -1e-3),
        ("optimizer.lr", math.inf),
        ("optimizer.betas", (0.9, 1.0)),
        ("schedule.kind", "step"),
        ("schedule.warmup_fraction", 1.5),
        ("run.steps", 0),
        ("run.batch_size", -1),
        ("run.dtype", "fp8"),
        ("data", []),
    ],
)
def test_value_out_of_range_is_named(path: str, value: Any) -> None:
    config = FinetuneConfig()
    owner: Any = config
    *groups, name = path.split(".")
    for group in groups:
        owner = getattr(owner, group)
    setattr(owner, name, value)
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        validate(config)


def test_resume_needs_a_directory() -> None:
    with pytest.raises(ConfigError, match="--output_dir"):
        validate(FinetuneConfig(resume=True))


def test_range_message() -> None:
    config = FinetuneConfig()
    config.adapter.dropout = 2
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert str(caught.value) == (
        "[PF018] adapter.dropout is 2; it must be a number of at least 0 and less than 1."
    )


@pytest.mark.parametrize(
    ("method", "part", "values", "text"),
    [
        ("ia3", "adapter", {"r": 4}, "adapter.r is 4, which is for lora and qlora, but the method is ia3."),
        (
            "sft",
            "adapter",
            {"r": 4, "dora": True},
            "adapter.r is 4 and adapter.dora is True, which is for lora and qlora, but the method is sft.",
        ),
        ("sft", "prompt", {"tokens": 4}, "prompt.tokens is 4, which is for p-tuning,"),
        ("lora", "bottleneck", {"bias": True}, "bottleneck.bias is True, which is for adapters,"),
        ("lora", "quant", {"nested": False}, "quant.nested is False, which is for qlora,"),
        ("p-tuning", "optimizer", {"loraplus_lr_ratio": 4.0}, "optimizer.loraplus_lr_ratio is 4.0,"),
    ],
)  # fmt: skip
def test_settings_of_another_method_are_refused(
    method: Any, part: str, values: dict[str, Any], text: str
) -> None:
    config = FinetuneConfig(method=method)
    for name, value in values.items():
        setattr(getattr(config, part), name, value)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert text in str(caught.value)
    fix = "Fix: leave it out, or --method "
    assert fix in str(caught.value)
    config.method = str(caught.value).partition(fix)[2]  # type: ignore[assignment]
    validate(config)


@pytest.mark.parametrize("method", ["lora", "qlora", "sft", "ia3", "p-tuning", "adapters"])
def test_the_saved_settings_of_a_run_are_valid_again(method: Any) -> None:
    """They hold the defaults of all methods."""
    saved = yaml.safe_load(yaml.safe_dump(to_dict(FinetuneConfig(method=method))))
    config = FinetuneConfig(method=method)
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            setattr(config, part.name, dataclasses.replace(value, **saved[part.name]))
    validate(config)
