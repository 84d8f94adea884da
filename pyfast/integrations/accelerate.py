# SPDX-License-Identifier: Apache-2.0
"""The one-line drop-in: serve the linears of an existing PEFT or bitsandbytes model by our ops.

A served module's class becomes a subclass of its own class, so identity, names, parameters, hooks,
state-dict keys and the library's own functions (merge, disable, save) stay as they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from pyfast.integrations.bitsandbytes import unsupported_reason, view_linear4bit
from pyfast.methods.base import adapted_modules, unwrapped
from pyfast.nn import AdapterLayer, NF4Linear, weight_of
from pyfast.nn.adapter_layer import has_hooks

_DROPOUTS = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Row:
    """What became of one module: the op that serves it, or why it was left alone."""

    path: str
    module: str
    op: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did, module by module; print it for a summary."""

    rows: list[Row] = field(default_factory=list)

    @property
    def served(self) -> list[Row]:
        """Rows of modules that pyfast serves."""
        return [row for row in self.rows if row.op]

    @property
    def left(self) -> list[Row]:
        """Rows of modules that were left alone."""
        return [row for row in self.rows if not row.op]

    def __str__(self) -> str:
        lines = [f"pyfast serves {len(self.served)} of {len(self.rows)} linear modules"]
        groups = Counter((row.module, row.op, row.reason) for row in self.rows)
        for (module, op, reason), count in groups.items():
            what = f"pyfast.{op}" if op else f"left alone: {reason}"
            first = next(
                r.path for r in self.rows if (r.module, r.op, r.reason) == (module, op, reason)
            )
            lines.append(f"  {count:4d} x {module}: {what} (first: {first})")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Serve a model's adapted and 4-bit linears by pyfast's ops, in place.

    Handles PEFT's LoRA layers over dense and bitsandbytes 4-bit weights, and bare `Linear4bit` layers.
    Parameters, names and state-dict keys do not change, so optimisers and checkpoints stay valid.

    Args:
        model: a `PeftModel`, a transformers model loaded in 4 bits, or any module tree.

    Returns:
        A report with one row for each linear module.

    Raises:
        ConfigError: `model` is not a module.
    """
    model = unwrapped(model)
    report = Report()
    lora_layer: Any = sys.modules.get("peft.tuners.lora.layer")
    bnb: Any = sys.modules.get("bitsandbytes.nn.modules")
    inside: list[str] = []
    # Inner modules first: an adapted layer's base is served before the layer is looked at.
    for path, module in reversed(list(model.named_modules())):
        name = type(module).__name__
        if lora_layer is not None and isinstance(module, lora_layer.LoraLayer):
            reason = _lora_reason(module)
            if not reason:
                _serve(module, _LoraForward)
            report.rows.append(Row(path, f"PEFT {name}", "" if reason else "lora_linear", reason))
            inside.append(f"{path}.")
        elif bnb is not None and isinstance(module, bnb.Linear4bit):
            reason = unsupported_reason(module)
            if not reason:
                _serve(module, _Linear4bitForward)
            report.rows.append(Row(path, name, "" if reason else "nf4_linear", reason))
        elif isinstance(module, NF4Linear):
            report.rows.append(Row(path, name, "nf4_linear", ""))
        elif weight_of(module) is not None:
            reason = "a dense linear without adapter: torch serves it best"
            report.rows.append(Row(path, name, "", reason))
    adapted = adapted_modules(model)
    for path, layer in adapted.items():
        if isinstance(layer, AdapterLayer):
            report.rows.append(Row(path, type(layer).__name__, "lora_linear", ""))
            inside.append(f"{path}.")
    report.rows = [r for r in report.rows if not any(r.path.startswith(p) for p in inside)]
    report.rows.reverse()
    return report


def _lora_reason(module: Any) -> str:
    """Why a PEFT LoRA layer cannot be served; empty if it can."""
    base = module.get_base_layer()
    if "forward" in vars(module) or "forward" in vars(base):
        return "its forward was replaced, as hooks that move weights between devices do"
    if weight_of(base) is None:
        if hasattr(base, "compute_dtype") and hasattr(base.weight, "quant_state"):
            return unsupported_reason(base)
        return f"its base layer {type(base).__name__} is not a linear that pyfast knows"
    if type(module).__name__ not in ("Linear", "Linear4bit"):
        return f"PEFT's {type(module).__name__} has a forward of its own"
    if module.lora_variant:
        return "it uses a LoRA variant such as DoRA"
    if any(module.lora_bias.values()):
        return "it has a bias in lora_B"
    if module.lora_embedding_A:
        return "it adapts an embedding"
    return next(filter(None, (_part_reason(module, name) for name in module.lora_A)), "")


def _part_reason(layer: Any, name: str) -> str:
    """Why an adapter's parts must be called as they are; empty if they are PEFT's own."""
    parts = ("lora_A", (nn.Linear,)), ("lora_B", (nn.Linear,)), ("lora_dropout", _DROPOUTS)
    for container, kinds in parts:
        part = getattr(layer, container)[name]
        if type(part) not in kinds:
            return f"its {container} is a {type(part).__name__}"
        if has_hooks(part):
            return f"its {container} has hooks or a replaced forward"
    return ""


def _serve(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _served_class(type(module), mixin)  # type: ignore[arg-type]


@cache
def _served_class(cls: Any, mixin: type) -> type[nn.Module]:
    served = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
    served.__qualname__ = cls.__qualname__
    return served


def _blank(cls: Any, mixin: type) -> nn.Module:
    served = _served_class(cls, mixin)
    return served.__new__(served)


class _Served:
    """Pickles and copies as a module of a class that is made again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, cls = type(self).__mro__[1], type(self).__mro__[3]
        return _blank, (cls, mixin), self.__getstate__()


class _LoraForward(_Served):
    """Forward of a PEFT LoRA layer through `lora_linear` where one plain adapter is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        weight = None
        if not (args or kwargs or layer.disable_adapters or layer.merged) and len(active) == 1:
            base = layer.get_base_layer()
            hooked = has_hooks(base) or _part_reason(layer, active[0])
            weight = None if hooked else weight_of(base)
        if weight is None or layer.lora_variant or layer.lora_bias[active[0]]:
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        name = active[0]
        dropout = layer.lora_dropout[name]
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return weight.lora_linear(x, a, b, layer.scaling[name], p)


class _Linear4bitForward(_Served):
    """Forward of bitsandbytes' `Linear4bit` through `nf4_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        weight = view_linear4bit(layer)
        if weight is None:
            out: Tensor = super().forward(x)  # type: ignore[misc]
            return out
        return weight.linear(x)
