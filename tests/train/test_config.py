# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest

from pyfast.errors import ConfigError
from pyfast.train.config import FinetuneConfig, validate


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
