# SPDX-License-Identifier: Apache-2.0
"""IA3: learned vectors scale keys, values and the MLP's inner activations (Liu et al., 2022).

The default places are the paper's and NeMo's in every family: the outputs of K and V (of a fused QKV its K
and V rows alone) and the input of the MLP's last projection; a layer's experts share one vector there. PEFT's
defaults differ by family; they apply where PEFT's own config object leaves the targets out. Files are PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import ConfigError, TargetModuleError, UnsupportedError
from pyfast.families import Layer, Role, automatic, layers_of
from pyfast.methods.base import (
    Method,
    Plan,
    adapted_modules,
    as_names,
    public_path,
    register_method,
    replace_modules,
)
from pyfast.methods.describe import adapter_fields, layers_with, pattern_of
from pyfast.methods.saved import plan_saved
from pyfast.methods.targets import (
    Matcher,
    linear_modules,
    match_saved,
    match_targets,
    named,
    served_weight,
)
from pyfast.nn.adapter_layer import AdapterLayer, link_of
from pyfast.nn.ia3 import DOWN, IA3Activation, IA3Linear, inner_size

PLACES = (Role.K, Role.V, Role.QKV, Role.DOWN)
"""What the default scales: outputs of keys and values, inputs of the MLP's last projection."""
# What PEFT 0.21 takes by model type: targets, and those of them that scale inputs. Its target w2 of Mixtral
# matches nothing there since transformers holds experts in 3-D tensors, and PEFT passes over it.
_KV = ["k_proj", "v_proj"]
_PEFT_DEFAULTS: dict[str, tuple[list[str], list[str]]] = {
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    "gpt_bigcode": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    "falcon": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "phi": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "bart": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "llama": ([*_KV, "down_proj"], ["down_proj"]),
    "mistral": ([*_KV, "down_proj"], ["down_proj"]),
    "mixtral": (_KV, []),
} | dict.fromkeys(
    ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
    (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
)


@dataclass
class IA3Config:
    """IA3's settings; names and meaning are those of PEFT's `IA3Config`, the default places are the paper's.

    Attributes:
        target_modules: names that end a module's path, a regular expression for the whole path, or
            "all-linear"; None takes K, V and the MLP's last projection.
        exclude_modules: same forms; removed from the targets.
        feedforward_modules: those of the targets whose input is scaled and not their output: ends of paths,
            or a regular expression; None takes the MLP's last projections. Of experts it is always the input.
        fused_rows: "kv": of a fused QKV only keys and values are scaled; "all": queries too, as PEFT does.
            PEFT does not know it: its config objects and files mean "all".
        modules_to_save: names of modules trained whole and saved with the adapter.
        init_ia3_weights: start with ones; False: with normal numbers (for tests).
        fan_in_fan_out: accepted; the layout is read off the module.
        task_type, base_model_name_or_path, revision, inference_mode: written to the adapter's file.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fused_rows: str = "kv"
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def check(self) -> None:
        """Raise ConfigError for values that cannot be served."""
        if self.fused_rows not in ("kv", "all"):
            raise ConfigError(f"IA3Config: fused_rows={self.fused_rows!r} must be 'kv' or 'all'")
        if not isinstance(self.init_ia3_weights, bool):
            raise ConfigError(
                f"IA3Config: init_ia3_weights={self.init_ia3_weights!r} must be True or False"
            )


class IA3Method(Method):
    """Wraps the target linears in `IA3Linear` and freezes everything else."""

    name = "IA3"
    config_type = IA3Config
    peft_type = "IA3"
    own_fields = ("fused_rows",)

    def completed(self, values: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """PEFT's defaults for what is left out."""
        values = {"fused_rows": "all"} | values
        kind = str(getattr(getattr(model, "config", None), "model_type", None))
        for at, field in enumerate(("target_modules", "feedforward_modules")):
            if values.get(field) is not None:
                continue
            if kind not in _PEFT_DEFAULTS:
                raise TargetModuleError(
                    f"IA3: PEFT has no default {field} for model type {kind!r}; set {field}, or use "
                    "pyfast.IA3Config() for keys, values and MLPs. Nothing was changed"
                )
            values[field] = list(_PEFT_DEFAULTS[kind][at])
        return values

    def plan(
        self,
        model: nn.Module,
        config: IA3Config,
        adapter_name: str,
        *,
        allow_unmatched: bool,
        autocast_adapter_dtype: bool,
    ) -> Plan:
        """Match the targets; see `Method.plan`. The vectors are float32 always, as PEFT's."""
        config.check()
        whole = match_saved(model, config.modules_to_save, allow_unmatched=allow_unmatched)
        roles = _roles(model)
        experts, targets = _experts(model, config)
        paths = match_targets(
            model,
            _default_paths(model, roles) if targets is None else targets,
            exclude=config.exclude_modules,
            saved=whole,
            allow_unmatched=allow_unmatched,
        )
        on_input = _feedforward(model, config, [*paths, *experts], roles, allow_unmatched)
        saved = plan_saved(model, whole, adapter_name)
        linears = linear_modules(model)
        shapes, rows = dict(saved.shapes), {}
        for path in paths:
            weight = served_weight(path, linears[path])
            ends = (1, weight.in_features) if path in on_input else (weight.out_features, 1)
            shapes[f"{path}.ia3_l"] = ends
            role, layer = roles.get(path, (None, None))
            if role is Role.QKV and layer and config.fused_rows == "kv" and path not in on_input:
                rows[path] = _kv_rows(path, layer, weight.out_features)

        for path, module in experts.items():
            if isinstance(module, AdapterLayer):
                raise UnsupportedError(
                    f"IA3: the experts of {path!r} carry LoRA on their parameters, beside which IA3 is not "
                    "served there; name target_modules without them. Nothing was changed"
                )
            shapes[f"{path}.ia3_l"] = (1, inner_size(module))

        def commit() -> None:
            for module in experts.values():
                beside = IA3Activation.at(module.act_fn)  # type: ignore[arg-type]
                beside.add(adapter_name, module, config.init_ia3_weights)
            wrapped: dict[nn.Module, nn.Module] = {}
            for path in paths:
                outermost = model.get_submodule(path)
                layer = link_of(outermost, IA3Linear)
                if layer is None:
                    layer = wrapped[outermost] = IA3Linear(outermost)
                    layer.train(outermost.training)
                layer.add(adapter_name, path in on_input, rows.get(path), config.init_ia3_weights)
            replace_modules(model, wrapped.get)
            saved.commit()

        return Plan(shapes, commit, saved.warnings)

    def fields(self, model: nn.Module, config: IA3Config, adapter_name: str) -> dict[str, Any]:
        """As PEFT writes them, and `fused_rows` where it makes a difference; see `Method.fields`."""
        fields = adapter_fields(model, config, adapter_name)
        layers: Any = layers_with(model, adapter_name)
        on_input = [path for path, layer in layers.items() if layer.on_input[adapter_name]]
        others = [path for path in layers if path not in on_input]
        names = fields["target_modules"]
        if isinstance(names, list):
            chosen = [name for name in names if any(path.endswith(name) for path in on_input)]
            if any(path.endswith(tuple(chosen)) for path in others):
                names = pattern_of(layers)
        experts = _adapted_experts(model, adapter_name)
        if isinstance(names, list):
            fields["target_modules"] = [*names, *experts]
            fields["feedforward_modules"] = [*chosen, *experts]
        else:
            fields["target_modules"] = "|".join(filter(None, [names, pattern_of(experts)]))
            fields["feedforward_modules"] = pattern_of([*on_input, *experts]) or "(?!)"
        if not any(adapter_name in layer.partial for layer in layers.values()):
            del fields["fused_rows"]
        return fields

    def unread_by_peft(self, model: nn.Module, adapter_name: str) -> tuple[str, ...]:
        """Vectors of experts, whose 3-D parameters PEFT's IA3 does not know; see `Method.unread_by_peft`."""
        return tuple(f"{path}.ia3_l" for path in _adapted_experts(model, adapter_name))


def _adapted_experts(model: nn.Module, adapter_name: str) -> list[str]:
    """Path of the last projection of experts that hold a vector of the adapter."""
    return [
        public_path(model, path)
        for path, module in adapted_modules(model).items()
        if isinstance(module, IA3Activation) and adapter_name in module.adapter_names()
    ]


def _roles(model: nn.Module) -> dict[str, tuple[Role, Layer]]:
    """Path to role and layer of every linear that a family's table, or `automatic`, knows."""
    return {
        f"{layer.path}.{path}": (role, layer)
        for layer in layers_of(model)
        for path, role in layer.roles().items()
    }


def _default_paths(model: nn.Module, roles: dict[str, tuple[Role, Layer]]) -> list[str]:
    """Keys, values and MLPs."""
    if not roles:
        automatic(model)  # says why there is no table
    return [path for path, (role, _) in roles.items() if role in PLACES]


def _experts(
    model: nn.Module, config: IA3Config
) -> tuple[dict[str, nn.Module], list[str] | str | None]:
    """Path of the last projection of each layer's experts that are targets, to the experts; and the targets
    without names that mean nothing else."""
    found = {
        f"{layer.path}.{path}": layer.module.get_submodule(path.rpartition(".")[0])
        for layer in layers_of(model)
        for path, role in layer.family.experts.items()
        if role is Role.DOWN and path.endswith(f".{DOWN}")
    }
    targets = config.target_modules
    if targets is None or not found:
        return found, targets
    if isinstance(targets, str):
        matcher = Matcher()
        return {path: m for path, m in found.items() if matcher.full(targets, path)}, targets
    names = as_names("target_modules", targets)
    chosen = {path: module for path, module in found.items() if named(names, path)}
    linears = linear_modules(model)
    meant = [
        name
        for name in names
        if any(named([name], path) for path in linears)
        or not any(named([name], path) for path in chosen)
    ]
    return chosen, meant


def _feedforward(
    model: nn.Module,
    config: IA3Config,
    paths: list[str],
    roles: dict[str, tuple[Role, Layer]],
    allow_unmatched: bool,
) -> set[str]:
    """Those of the targets whose input is scaled, by PEFT's rule that a name may be any end of a path."""
    chosen = config.feedforward_modules
    if chosen is None:
        if not roles:
            raise TargetModuleError(
                f"{type(model).__name__} has no default feedforward_modules; set them, [] for none. "
                "Nothing was changed"
            )
        return {path for path in paths if path in roles and roles[path][0] is Role.DOWN}
    if isinstance(chosen, str):
        matcher = Matcher()
        found = {path for path in paths if matcher.full(chosen, path)}
        missed = [] if found else [chosen]
    else:
        names = as_names("feedforward_modules", chosen)
        found = {path for path in paths if path.endswith(tuple(names))}
        missed = [name for name in names if not any(path.endswith(name) for path in found)]
    if missed and not allow_unmatched:
        raise TargetModuleError(
            f"feedforward_modules: {missed[0]!r} matches none of the {len(paths)} target modules (first: "
            f"{paths[0]!r}). Nothing was changed"
        )
    return found


def _kv_rows(path: str, layer: Layer, out_features: int) -> Tensor:
    """Which outputs of a fused QKV are keys or values, in the order of the outputs."""
    try:
        layout = layer.layout(Role.QKV)
    except KeyError:
        layout = None
    if layout is None or layout.out_features != out_features:
        raise UnsupportedError(
            f"IA3: how queries, keys and values lie in {path!r} is not known for {layer.family.name}; set "
            "fused_rows='all' to scale queries too. Nothing was changed"
        )
    return torch.cat([layout.rows(Role.K), layout.rows(Role.V)]).sort().values


register_method(IA3Method())
