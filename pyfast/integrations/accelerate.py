# SPDX-License-Identifier: Apache-2.0
"""The one-line drop-in: serve the linears of an existing PEFT or bitsandbytes model by our ops.

A served module's class becomes a subclass of its own class, so identity, names, parameters, hooks,
state-dict keys and the library's own functions (merge, disable, save) stay as they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from pyfast.families import shared_inputs
from pyfast.integrations.bitsandbytes import (
    check_linear4bit,
    unsupported_reason,
    view_linear4bit,
)
from pyfast.methods.base import adapted_modules, unwrapped
from pyfast.methods.of_peft import is_peft_layer
from pyfast.methods.targets import kept_dense, output_layers
from pyfast.nn import NF4Linear, NF4Tensor, SavedModule, weight_of
from pyfast.nn.adapter_layer import has_hooks
from pyfast.nn.dora import dora_linear
from pyfast.nn.experts import NF4Experts, expert_tensors, quantized_names, unserved_experts
from pyfast.nn.group import GroupMember, Part, form_groups, part_of
from pyfast.nn.weight import forward_replaced
from pyfast.ops._serving import serving

_DROPOUTS = (nn.Dropout, nn.Identity)
_VARIANTS = ("NoneType", "DoraLinearVariant")
_GROUP = "lora_group"


@dataclass(frozen=True)
class Row:
    """What became of one module: the op that serves it, or why it was left alone."""

    path: str
    module: str
    op: str
    reason: str
    group: str = ""
    """Names of the modules that one `lora_group` serves, this one among them, where nothing drops."""

    @property
    def what(self) -> str:
        """The op or the reason in words."""
        if not self.op:
            return f"left alone: {self.reason}"
        if self.op == _GROUP:
            return f"pyfast.{self.op} of {self.group}"
        return f"pyfast.{self.op}" + (
            f"; pyfast.{_GROUP} of {self.group} while dropout is off" if self.group else ""
        )


@dataclass
class Report:
    """What `accelerate` did, module by module; print it for a summary."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What serves each op on its device, as `pyfast info` says it; or what to do first."""

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
        alike = Counter((row.module, row.what) for row in self.rows)
        for (module, what), count in alike.items():
            first = next(r.path for r in self.rows if (r.module, r.what) == (module, what))
            lines.append(f"  {count:4d} x {module}: {what} (first: {first})")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def accelerate(model: nn.Module) -> Report:
    """Serve a model's adapted and 4-bit linears by pyfast's ops, in place.

    Handles PEFT's LoRA layers over dense and bitsandbytes 4-bit weights, and bare `Linear4bit` layers. In
    models of a known family, layers over dense weights that read one input (q, k and v; gate and up) are
    served together.
    Parameters, names and state-dict keys do not change, so optimisers and checkpoints stay valid.

    Args:
        model: a `PeftModel`, a transformers model loaded in 4 bits, or any module tree.

    Returns:
        A report with one row for each linear module.

    Raises:
        ConfigError: `model` is not a module.
        QuantStateError: a 4-bit layer's quantisation state is damaged; nothing was changed.
    """
    model = unwrapped(model)
    report = Report()
    lora_layer: Any = sys.modules.get("peft.tuners.lora.layer")
    bnb: Any = sys.modules.get("bitsandbytes.nn.modules")
    if bnb is not None:
        for path, module in model.named_modules():
            if isinstance(module, bnb.Linear4bit):
                check_linear4bit(path, module)
    left_dense = _left_dense(model)
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
            report.rows.append(Row(path, name, "", left_dense(path)))
        elif tensors := expert_tensors(module):
            reason = unserved_experts(module, tensors, 64) or "pyfast.quantize can make them NF4"
            report.rows.append(Row(path, name, "", f"{', '.join(tensors)} are dense: {reason}"))
        if isinstance(module, NF4Experts):
            names = ", ".join(quantized_names(module))  # type: ignore[arg-type]
            report.rows.append(Row(path, f"{name} of {names}", "nf4_linear", ""))
    adapted = adapted_modules(model)
    for path, layer in adapted.items():
        if layer.op:
            report.rows.append(Row(path, type(layer).__name__, layer.op, ""))
        if not isinstance(layer, SavedModule):
            inside.append(f"{path}.")
    report.rows = [r for r in report.rows if not any(r.path.startswith(p) for p in inside)]
    places = {path: place for place, (path, _) in enumerate(model.named_modules())}
    report.rows.sort(key=lambda row: places[row.path])
    form_groups(shared_inputs(model))
    report.rows = [_with_group(row, model.get_submodule(row.path)) for row in report.rows]
    report.notes = _notes(model, report)
    return report


def _notes(model: nn.Module, report: Report) -> list[str]:
    """See `Report.notes`."""
    if report.rows and not report.served and not any(map(is_peft_layer, model.modules())):
        return [
            "there is no adapter yet: call PEFT's get_peft_model or pyfast.apply first, or pyfast.quantize "
            "for NF4 alone"
        ]
    found: dict[tuple[str, str], None] = {}
    for row in report.served:
        tensors = model.get_submodule(row.path).parameters()
        device = next((tensor.device.type for tensor in tensors), "cpu")
        found |= {(op, device): None for op in (row.op, _GROUP if row.group else row.op)}
    return [f"pyfast.{op} on {device}: {serving(op, device)[0]}" for op, device in found]


def _left_dense(model: nn.Module) -> Callable[[str], str]:
    """Why the dense linear at a path is left alone."""
    bnb: Any = sys.modules.get("bitsandbytes.nn.modules")
    kinds = (NF4Tensor, bnb.Linear4bit) if bnb is not None else NF4Tensor
    if not any(isinstance(module, kinds) for module in model.modules()):
        return lambda path: "a dense linear without adapter: torch serves it best"
    heads, kept = output_layers(model), kept_dense(model)

    def reason(path: str) -> str:
        if path in heads:
            return "the output layer, which stays dense"
        if path in kept:
            return "dense, since the model keeps it in float32"
        return "dense in a 4-bit model; pyfast.quantize can make it NF4"

    return reason


def _with_group(row: Row, module: nn.Module) -> Row:
    """The row of a module that may be a member of a group."""
    parts = module.company() if row.op and isinstance(module, GroupMember) else {}
    if not parts:
        return row
    drops = any(part.dropout > 0 for part in parts.values())
    return replace(row, op=row.op if drops else _GROUP, group=", ".join(parts))


def _lora_reason(module: Any) -> str:
    """Why a PEFT LoRA layer cannot be served; empty if it can."""
    base = module.base_layer
    if forward_replaced(module) or forward_replaced(base):
        return "its forward was replaced, as hooks that move weights between devices do"
    if "base_layer" in base._modules:
        return "its base layer carries adapters of another kind"
    if weight_of(base) is None:
        if hasattr(base, "compute_dtype") and hasattr(base.weight, "quant_state"):
            return unsupported_reason(base)
        return f"its base layer {type(base).__name__} is not a linear that pyfast knows"
    if type(module).__name__ not in ("Linear", "Linear4bit"):
        return f"PEFT's {type(module).__name__} has a forward of its own"
    if module.lora_embedding_A:
        return "it adapts an embedding"
    return next(filter(None, (_part_reason(module, name) for name in module.lora_A)), "")


def _part_reason(layer: Any, name: str) -> str:
    """Why an adapter's parts must be called as they are; empty if they are PEFT's own."""
    variant = type(layer.lora_variant.get(name)).__name__
    if variant not in _VARIANTS:
        return f"it uses PEFT's {variant}"
    if isinstance(layer.scaling[name], Tensor):
        return "its scale is a tensor, as PEFT's compiled hot-swap needs it"
    norms = layer.lora_magnitude_vector
    if name in norms and has_hooks(norms[name]):
        return "its lora_magnitude_vector has hooks or a replaced forward"
    parts = ("lora_A", (nn.Linear,)), ("lora_B", (nn.Linear,)), ("lora_dropout", _DROPOUTS)
    for container, kinds in parts:
        part = layer._modules[container]._modules[name]
        if type(part) not in kinds:
            return f"its {container} is a {type(part).__name__}"
        if has_hooks(part):
            return f"its {container} has hooks or a replaced forward"
        if part._parameters.get("bias") is not None:
            return f"it has a bias in {container}"
    return ""


def _serve(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, mixin):
        vars(module).pop("forward", None)  # the class's own, which removed hooks leave there
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
        mixin, cls = type(self).__bases__
        return _blank, (cls, mixin), self.__getstate__()


class _LoraForward(_Served, GroupMember):
    """Forward of a PEFT LoRA layer through `lora_linear` where one adapter, plain or DoRA's, is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        name = None if args or kwargs else self._one_adapter()
        p, drops = (0.0, False) if name is None else self._dropout(name)
        group = None if name is None or drops else self.live_group()
        if name is not None and group is not None:
            together = group.output(self, x, self._part(name))
            if together is not None:
                return together
        weight = None if name is None else weight_of(self.frozen_layer())
        if name is None or weight is None:
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        scale, dropout = layer.scaling[name], p if drops else 0.0
        if name in layer.lora_variant:
            norms, base = layer.lora_magnitude_vector[name].weight, self.frozen_layer()
            return dora_linear(weight, x, a, b, scale, dropout, norms, base)
        return weight.lora_linear(x, a, b, scale, dropout)

    def frozen_layer(self) -> nn.Module:
        layer: Any = self
        base: nn.Module = layer._modules["base_layer"]  # PEFT's search for it takes 3 us
        return base

    def lora_part(self) -> Part | None:
        name = self._one_adapter()
        return None if name is None else self._part(name)

    def _part(self, name: str) -> Part | None:
        layer: Any = self
        if name in layer.lora_variant:
            return None
        a, b = (layer._modules[each]._modules[name] for each in ("lora_A", "lora_B"))
        scale, (dropout, drops) = layer.scaling[name], self._dropout(name)
        return part_of(layer, self.frozen_layer(), a, b, scale, dropout, drops)

    def _one_adapter(self) -> str | None:
        """The one active adapter, if its parts need not be called one by one."""
        layer: Any = self
        held = layer._modules["lora_A"]._modules
        active = [name for name in layer.active_adapters if name in held]
        if layer.disable_adapters or layer.merged or len(active) != 1:
            return None
        base = self.frozen_layer()
        odd = "base_layer" in base._modules or has_hooks(base) or _part_reason(layer, active[0])
        return None if odd else active[0]

    def _dropout(self, name: str) -> tuple[float, bool]:
        """Its probability, and whether it is on."""
        dropout: Any = self.lora_dropout[name]  # type: ignore[attr-defined]
        p = dropout.p if type(dropout) is nn.Dropout else 0.0
        return p, p > 0 and dropout.training


class _Linear4bitForward(_Served):
    """Forward of bitsandbytes' `Linear4bit` through `nf4_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        weight = view_linear4bit(layer)
        if weight is None:
            out: Tensor = super().forward(x)  # type: ignore[misc]
            return out
        return weight.linear(x)
