# SPDX-License-Identifier: Apache-2.0
"""A table for a model of no known family, from names that many families give their linears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from pyfast.errors import TargetModuleError
from pyfast.families.base import Family, Role
from pyfast.nn import AdapterLayer, weight_of
from pyfast.nn.expert_lora import NOT_LINEAR

_NAMES = {
    Role.Q: ("q_proj", "query", "query_proj", "q", "wq", "q_lin"),
    Role.K: ("k_proj", "key", "key_proj", "k", "wk", "k_lin"),
    Role.V: ("v_proj", "value", "value_proj", "v", "wv", "v_lin"),
    Role.QKV: ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "qkv"),
    Role.GATE: ("gate_proj", "w1", "wi_0"),
    Role.UP: ("up_proj", "w3", "wi", "wi_1", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    Role.GATE_UP: ("gate_up_proj",),
    Role.DOWN: ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo", "o")
"""Attention's output beside a query, the MLP's beside an up projection."""
_CROSS = ("cross", "encdec", "encoder_attn")


def automatic(model: nn.Module) -> Family:
    """The table of a model whose layers hold nothing but linears with common names.

    What such names do not tell is left out: how fused linears are laid out, and experts in 3-D tensors.

    Raises:
        TargetModuleError: there is no list of layers, or a linear in it has another name.
    """
    lists = dict(_outermost_lists(model))
    linears = [path for layers in lists.values() for layer in layers for path in _linears(layer)]
    linears = list(dict.fromkeys(linears))
    roles = {path: _ROLES[name] for path in linears if (name := _last(path)) in _ROLES}
    for path in linears:
        if path not in roles and _last(path) in _OUTPUTS:
            beside = {role for other, role in roles.items() if _parent(other) == _parent(path)}
            if beside & {Role.Q, Role.QKV}:
                roles[path] = Role.ATTENTION_OUT
            elif beside & {Role.UP, Role.GATE_UP}:
                roles[path] = Role.DOWN
    unknown = [path for path in linears if path not in roles]
    if not roles and not unknown:
        _refuse(model, "")
    if unknown:
        _refuse(
            model,
            f", or add its family to pyfast.families: the role of {unknown[0]!r} is not known",
        )
    mixers = _blocks(roles, Role.ATTENTION_OUT)
    return Family(
        name=f"{type(model).__name__} (by the names of its linears)",
        model_types=(),
        layers=tuple(lists),
        roles=roles,
        lora_targets=_named_as(roles, Role.QKV) or _named_as(roles, Role.Q, Role.V),
        mixers=mixers,
        mlps=_blocks(roles, Role.DOWN),
        cross_attention=tuple(p for p in mixers if any(word in p.lower() for word in _CROSS)),
    )


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise TargetModuleError(
        f"{type(model).__name__} has no default targets; set target_modules, for example "
        f"target_modules='all-linear'{reason}. Nothing was changed"
    )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules with linears inside, and none of the lists inside those."""
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from _outermost_lists(child, f"{path}{name}.")
        elif any(_linears(layer) for layer in child):
            yield f"{path}{name}", child


def _linears(layer: nn.Module) -> list[str]:
    """Paths of a layer's linears, of adapted ones without what is inside."""
    found: list[str] = []
    adapted: list[str] = []
    for path, module in layer.named_modules():
        if any(path.startswith(f"{outer}.") for outer in adapted):
            continue
        if isinstance(module, AdapterLayer):
            adapted.append(path)
        if not isinstance(module, NOT_LINEAR) and (
            isinstance(module, AdapterLayer) or weight_of(module) is not None
        ):
            found.append(path)
    return found


def _named_as(roles: dict[str, Role], *wanted: Role) -> tuple[str, ...]:
    found = [_last(path) for each in wanted for path, role in roles.items() if role is each]
    return tuple(dict.fromkeys(found))


def _blocks(roles: dict[str, Role], output: Role) -> tuple[str, ...]:
    """Modules that hold the linears of a role; for those of experts in a list the one that holds the list."""
    found = []
    for path, role in roles.items():
        parts = _parent(path).split(".")
        block = parts[:-2] if parts[-1].isdigit() else parts
        if role is output and any(block):
            found.append(".".join(block))
    return tuple(dict.fromkeys(found))
