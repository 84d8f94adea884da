# SPDX-License-Identifier: Apache-2.0
"""On which base weights an adapter was trained, dense or in NF4 of which settings: what its file says of it,
and what loading says where the model has others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torch import nn

from pyfast.methods.base import adapted_modules
from pyfast.nn import AdapterLayer, NF4Tensor, NF4Weight, weight_of

_UNTOLD = "nf4"
"""What files of NF4 said before they had the settings; of dense weights they said "dense"."""


@dataclass(frozen=True, order=True)
class NF4Settings:
    """Those that change what the weights stand for, by the names that `quantize` has for them."""

    blocksize: int
    nested: bool

    def __str__(self) -> str:
        return f"blocksize={self.blocksize}, nested={self.nested}"


class OtherBaseWarning(UserWarning):
    """An adapter is loaded onto other base weights than it was trained on.

    Attributes:
        finding: what was found, without the fix.
        trained: the settings of NF4 that it was trained on; none for a dense base, None if not known.
    """

    def __init__(
        self, finding: str, fix: str = "", trained: tuple[NF4Settings, ...] | None = None
    ) -> None:
        super().__init__(f"{finding}; {fix}")
        self.finding, self.trained = finding, trained


def nf4_settings(model: nn.Module) -> tuple[NF4Settings, ...] | None:
    """The settings of a model's NF4 weights, as they were before adapters were merged into them; empty for a
    dense model, None where a weight of bitsandbytes cannot be read (for the CPU it repacks them)."""
    layers = [m for m in adapted_modules(model).values() if isinstance(m, AdapterLayer)]
    merged = {layer.frozen for layer in layers}
    others = [module for module in model.modules() if module not in merged]
    found = set()
    for module in [layer.original for layer in layers] + others:
        weight = module.nf4_weight() if isinstance(module, NF4Tensor) else weight_of(module)
        if isinstance(weight, NF4Weight):
            found.add(NF4Settings(weight.blocksize, weight.nested_absmax is not None))
        elif getattr(module._parameters.get("weight"), "quant_state", None) is not None:
            return None
    return tuple(sorted(found))


def described(model: nn.Module) -> str | None:
    """What a file says of the base: JSON, a list of settings that is empty for a dense model; None where the
    model does not tell."""
    found = nf4_settings(model)
    return None if found is None else json.dumps([asdict(one) for one in found], sort_keys=True)


def check_base(adapter: str, recorded: str | None, model: nn.Module) -> OtherBaseWarning | None:
    """What to say where a model's weights are not those that a file speaks of.

    Args:
        adapter: its name for the message.
        recorded: what `described` gave, or an older file says; what else is there tells nothing.
        model: it is loaded into.
    """
    trained, now, name = _read(recorded), nf4_settings(model), type(model).__name__
    if now is None:
        return None
    if recorded == _UNTOLD and not now:
        return _found(adapter, "an NF4 base", f"this {name} is dense", "", None)
    if trained is None or trained == now:
        return None
    if not trained:
        return OtherBaseWarning(
            f"adapter {adapter} was trained on a dense base, but this {name} is in NF4 ({_named(now)}), "
            "whose weights are rounded",
            "load the dense model for the weights it was trained on",
            trained,
        )
    here = f"has {_named(now)}" if now else "is dense"
    call = str(trained[0]) if len(trained) == 1 else ""
    return _found(adapter, f"an NF4 base ({_named(trained)})", f"this {name} {here}", call, trained)


def _found(
    adapter: str, base: str, here: str, call: str, trained: tuple[NF4Settings, ...] | None
) -> OtherBaseWarning:
    """For an adapter that was trained on NF4."""
    return OtherBaseWarning(
        f"adapter {adapter} was trained on {base}, but {here}",
        f"call pyfast.quantize({', '.join(filter(None, ['model', call]))}) on the dense model before "
        "load_adapter for the weights it was trained on",
        trained,
    )


def _named(settings: tuple[NF4Settings, ...]) -> str:
    return " and ".join(map(str, settings))


def _read(recorded: str | None) -> tuple[NF4Settings, ...] | None:
    """The settings in a file, which is untrusted; None where it does not say."""
    try:
        values = json.loads(recorded or "")
        found = {NF4Settings(value["blocksize"], value["nested"]) for value in values}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    known = all(type(s.blocksize) is int and type(s.nested) is bool for s in found)
    return tuple(sorted(found)) if known and isinstance(values, list) else None
