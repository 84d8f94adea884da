# SPDX-License-Identifier: Apache-2.0
"""Checks of a run's settings, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pyfast.errors import ConfigError
from pyfast.methods.pissa import is_pissa
from pyfast.train.config import FinetuneConfig

# field: (lowest value, lowest is allowed, highest value, highest is allowed)
_RANGES: dict[str, tuple[float, bool, float, bool]] = {
    "adapter.r": (1, True, math.inf, False),
    "adapter.alpha": (0, False, math.inf, False),
    "adapter.dropout": (0, True, 1, False),
    "prompt.tokens": (1, True, math.inf, False),
    "prompt.hidden": (1, True, math.inf, False),
    "bottleneck.size": (1, True, math.inf, False),
    "dataset.eval_fraction": (0, True, 1, False),
    "dataset.max_length": (2, True, math.inf, False),
    "dataset.max_bad_fraction": (0, True, 1, True),
    "optimizer.lr": (0, False, math.inf, False),
    "optimizer.weight_decay": (0, True, math.inf, False),
    "optimizer.eps": (0, False, math.inf, False),
    "optimizer.max_grad_norm": (0, True, math.inf, False),
    "optimizer.loraplus_lr_ratio": (0, False, math.inf, False),
    "schedule.warmup_fraction": (0, True, 1, True),
    "schedule.min_ratio": (0, True, 1, True),
    "run.epochs": (0, False, math.inf, False),
    "run.steps": (1, True, math.inf, False),
    "run.batch_size": (1, True, math.inf, False),
    "run.accumulation": (1, True, math.inf, False),
    "run.seed": (0, True, 2**63, False),
    "run.eval_every": (0, True, math.inf, False),
    "run.save_every": (0, True, math.inf, False),
    "run.keep_last": (1, True, math.inf, False),
    "run.log_every": (1, True, math.inf, False),
    "run.samples": (0, True, math.inf, False),
    "run.max_predict_samples": (1, True, math.inf, False),
    "run.max_new_tokens": (1, True, math.inf, False),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("lora", "qlora", "sft", "ia3", "p-tuning", "adapters"),
    "prompt.encoder": ("mlp", "lstm", "nemo"),
    "bottleneck.placement": ("houlsby", "pfeiffer"),
    "bottleneck.activation": ("silu", "gelu", "relu"),
    "dataset.split_by": ("prompt_and_answer", "prompt"),
    "dataset.on_bad_record": ("raise", "skip"),
    "optimizer.name": ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    "schedule.kind": ("cosine", "linear", "constant"),
    "run.dtype": ("auto", "bf16", "fp32"),
}


# What only some methods read: a part, or a field of one.
METHODS: dict[str, tuple[str, ...]] = {
    "adapter": ("lora", "qlora"),
    "prompt": ("p-tuning",),
    "bottleneck": ("adapters",),
    "quant": ("qlora",),
    "optimizer.loraplus_lr_ratio": ("lora", "qlora"),
}


def _get(config: FinetuneConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_given(part: Any, path: str = "") -> None:
    """Refuse None, YAML's null, where a value is needed."""
    for field_ in dataclasses.fields(part):
        value, name = getattr(part, field_.name), path + field_.name
        if dataclasses.is_dataclass(value):
            _check_given(value, f"{name}.")
        elif value is None and field_.default is not None:
            raise ConfigError(f"{name} is null. Fix: leave it out for {field_.default!r}.")


def validate(config: FinetuneConfig) -> None:
    """Check every value of a configuration before anything is loaded.

    Raises:
        ConfigError: A value is out of its range, or two values do not go together.
    """
    _check_given(config)
    for path, choices in _CHOICES.items():
        if (value := _get(config, path)) not in choices:
            raise ConfigError(f"{path} is {value!r}. Fix: one of {', '.join(choices)}.")
    for path, (low, low_in, high, high_in) in _RANGES.items():
        value = _get(config, path)
        if value is None:  # not given: the default is chosen elsewhere
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (
            number
            and (value >= low if low_in else value > low)
            and (value <= high if high_in else value < high)
        ):
            bound = f"{'at least' if low_in else 'more than'} {low:g}"
            if math.isfinite(high):
                bound += f" and {'at most' if high_in else 'less than'} {high:g}"
            raise ConfigError(f"{path} is {value!r}; it must be a number of {bound}.")
    for beta in config.optimizer.betas:
        if not 0 <= beta < 1:
            raise ConfigError(
                f"optimizer.betas is {config.optimizer.betas}; both must be in [0, 1)."
            )
    _check_method(config)
    _check_init(config)
    if config.data == []:
        raise ConfigError(
            "data is an empty list. Fix: --data train.jsonl, or leave it out for the default."
        )
    if config.resume and config.output_dir is None:
        raise ConfigError(
            "resume needs the directory of the run to go on with. Fix: --output_dir DIR."
        )


def _check_method(config: FinetuneConfig) -> None:
    """Refuse what was set, and so differs from its default, but is not for the method of the run."""
    default = FinetuneConfig()
    for path, methods in METHODS.items():
        part = _get(default, path)
        inside = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
        names = [f"{path}.{field_.name}" for field_ in inside] or [path]
        given = [name for name in names if _get(config, name) != _get(default, name)]
        if not given or config.method in methods:
            continue
        values = " and ".join(f"{name} is {_get(config, name)!r}" for name in given)
        raise ConfigError(
            f"{values}, which is for {' and '.join(methods)}, but the method is {config.method}. "
            f"Fix: leave it out, or --method {methods[0]}"
        )


def _check_init(config: FinetuneConfig) -> None:
    """Refuse initial values of adapters that there are not, or that the method cannot have."""
    init = config.adapter.init
    pissa = is_pissa(init)
    if not pissa and init not in ("kaiming", "gaussian"):
        raise ConfigError(
            f"adapter.init is {init!r}. Fix: one of kaiming, gaussian, pissa, pissa_niter_16."
        )
    if pissa and config.method == "qlora":
        raise ConfigError(
            f"adapter.init is {init!r}, which turns base weights into residuals, but qlora rounds them to "
            "NF4 first. Fix: --method lora, or --adapter.init kaiming"
        )
