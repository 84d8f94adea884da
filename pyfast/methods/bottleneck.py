# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters (Houlsby et al., 2019): small networks behind attention and MLP.

The default is NeMo's canonical form: h + U silu(D LayerNorm(h)), without biases, of size 32, U starting as
zeros, on the output of every block that mixes positions (attention, cross-attention, recurrence) and of every
MLP, before a norm of that output (Gemma 2's and 3's) and before the residual is added. "pfeiffer" leaves out
those behind attention (Pfeiffer et al., 2021, in models whose norms come first).

PEFT has no such method, so that the file's layout is ours. `adapter_config.json` holds `BottleneckConfig`'s
fields and `"peft_type": "BOTTLENECK"`; `adapter_model.safetensors` for each block at `<path>` (such as
`model.layers.0.self_attn`) the tensors

    base_model.model.<path>.bottleneck.down         [R, K]   R: the size, K: the model's hidden size
    base_model.model.<path>.bottleneck.up           [K, R]
    base_model.model.<path>.bottleneck.down_bias    [R]      with `bias`
    base_model.model.<path>.bottleneck.up_bias      [K]      with `bias`
    base_model.model.<path>.bottleneck.norm_weight  [K]      with `layer_norm`
    base_model.model.<path>.bottleneck.norm_bias    [K]      with `layer_norm`

and those of `modules_to_save` as PEFT has them. A block at `<path>` computes h as before and returns
h + act(norm(h) down^T + down_bias) up^T + up_bias, with a LayerNorm of eps 1e-5 and the exact GELU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyfast.errors import ConfigError, TargetModuleError, UnsupportedError
from pyfast.families import automatic, layers_of
from pyfast.methods.base import Method, Plan, as_names, refuse_meta, register_method
from pyfast.methods.saved import plan_saved
from pyfast.methods.targets import Matcher, layer_index, match_saved, named
from pyfast.nn.bottleneck import BottleneckAdapter, Bottlenecks
from pyfast.ops.adapter import ACTIVATIONS

_PLACEMENTS = ("houlsby", "pfeiffer")
_MAX_SIZE = 1 << 16


@dataclass
class BottleneckConfig:
    """Settings of bottleneck adapters; the defaults are NeMo's.

    Attributes:
        bottleneck_size: R.
        placement: "houlsby": behind attention and MLP; "pfeiffer": behind the MLP alone.
        activation: "silu", "gelu" (the exact one) or "relu".
        layer_norm: a LayerNorm in front of the adapter.
        bias: biases of its two linears.
        target_modules: names that end a block's path, or a regular expression for the whole path, in the
            place of what `placement` says; each must return a tensor of the hidden size, or a tuple that
            begins with it.
        layers_to_transform: layer indices to adapt; None means all.
        modules_to_save: names of modules trained whole and saved with the adapter.
        task_type, base_model_name_or_path, revision, inference_mode: written to the adapter's file.
    """

    bottleneck_size: int = 32
    placement: str = "houlsby"
    activation: str = "silu"
    layer_norm: bool = True
    bias: bool = False
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def check(self) -> None:
        """Raise ConfigError for values that cannot be served."""
        size = self.bottleneck_size
        if type(size) is not int or not 1 <= size <= _MAX_SIZE:
            raise ConfigError(
                f"BottleneckConfig: bottleneck_size={size!r} must be an integer of at least 1 and at most "
                f"{_MAX_SIZE}"
            )
        for name, choices in {"placement": _PLACEMENTS, "activation": ACTIVATIONS}.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"BottleneckConfig: {name}={value!r} must be one of {choices}")
        for name in ("layer_norm", "bias"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"BottleneckConfig: {name}={value!r} must be True or False")


class BottleneckMethod(Method):
    """Hangs `Bottlenecks` on the blocks and freezes everything else."""

    name = "Adapters"
    config_type = BottleneckConfig
    peft_type = "BOTTLENECK"

    def plan(
        self,
        model: nn.Module,
        config: BottleneckConfig,
        adapter_name: str,
        *,
        allow_unmatched: bool,
        autocast_adapter_dtype: bool,
    ) -> Plan:
        """Find the blocks; see `Method.plan`. Adapters of half-precision models are float32, as LoRA's."""
        config.check()
        whole = match_saved(model, config.modules_to_save, allow_unmatched=allow_unmatched)
        blocks = _blocks(model, config, allow_unmatched)
        saved = plan_saved(model, whole, adapter_name)
        inside = [path for path in blocks if any(f"{path}.".startswith(f"{w}.") for w in whole)]
        if inside:
            raise UnsupportedError(
                f"modules_to_save: {inside[0]!r} is to have a bottleneck adapter; a module cannot be trained "
                "whole beside it. Nothing was changed"
            )

        def adapter(path: str, **where: Any) -> BottleneckAdapter:
            options = (config.bottleneck_size, config.layer_norm, config.bias, config.activation)
            return BottleneckAdapter(blocks[path], *options, **where)

        shapes = dict(saved.shapes)
        for path in blocks:
            refuse_meta("Adapters", model.get_submodule(path).named_parameters())
            for key, parameter in adapter(path, device="meta").named_parameters():
                shapes[f"{path}.{Bottlenecks.child}.{key}"] = tuple(parameter.shape)

        def commit() -> None:
            for path in blocks:
                block = model.get_submodule(path)
                where = _place(model, block, autocast_adapter_dtype)
                made = adapter(path, **where).train(block.training)
                Bottlenecks.at(block).adapters[adapter_name] = made
            saved.commit()

        return Plan(shapes, commit, saved.warnings)


def _place(model: nn.Module, block: nn.Module, autocast: bool) -> dict[str, Any]:
    """Device and dtype of an adapter: the block's, or float32 beside half precision."""
    held = list(block.parameters())
    floats = [p.dtype for p in (*held, *model.parameters()) if p.is_floating_point()]
    dtype = floats[0] if floats else torch.float32
    if autocast and dtype.itemsize <= 2:
        dtype = torch.float32
    return {"device": held[0].device if held else None, "dtype": dtype}


def _blocks(model: nn.Module, config: BottleneckConfig, allow_unmatched: bool) -> dict[str, int]:
    """Path of every block that is to have an adapter to the hidden size."""
    found: dict[str, int] = {}
    if config.target_modules is None:
        layers = list(layers_of(model))
        if not layers:
            _hidden_size(getattr(model, "config", None), model)  # asks for both that are missing
            automatic(model)  # says why there is no table
        for layer in layers:
            paths = layer.mlps()
            if config.placement == "houlsby":
                paths = [*layer.mixers(), *paths]
            for path in paths:
                found[f"{layer.path}.{path}"] = _hidden_size(layer.config, model)
    else:
        width = _hidden_size(getattr(model, "config", None), model)
        found = dict.fromkeys(_named_blocks(model, config.target_modules, allow_unmatched), width)
    layers_wanted = config.layers_to_transform
    if layers_wanted is not None:
        wanted = list(layers_wanted) if isinstance(layers_wanted, Iterable) else [layers_wanted]
        indices = {path: layer_index(path) for path in found}
        missed = [index for index in wanted if index not in indices.values()]
        if missed and not allow_unmatched:
            raise TargetModuleError(
                f"layers_to_transform: there is no layer {missed[0]!r} with a block to adapt. Nothing was "
                "changed"
            )
        found = {path: width for path, width in found.items() if indices[path] in wanted}
    if not found:
        raise TargetModuleError(
            f"{type(model).__name__} has no block to adapt; set target_modules. Nothing was changed"
        )
    return found


def _named_blocks(model: nn.Module, targets: list[str] | str, allow_unmatched: bool) -> list[str]:
    paths = [path for path, _ in model.named_modules() if path]
    if isinstance(targets, str):
        matcher = Matcher()
        found = [path for path in paths if matcher.full(targets, path)]
        missed = [] if found else [targets]
    else:
        names = as_names("target_modules", targets)
        found = [path for path in paths if named(names, path)]
        missed = [name for name in names if not any(named([name], path) for path in paths)]
    if missed and not allow_unmatched:
        raise TargetModuleError(
            f"target_modules: {missed[0]!r} matches no module of {type(model).__name__}. Nothing was changed"
        )
    return found


def _hidden_size(config: Any, model: nn.Module) -> int:
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise UnsupportedError(
            f"Adapters: {type(model).__name__} has no config with a hidden_size, which says how wide its "
            "blocks are. Nothing was changed. Fix: a model.config with it, and target_modules that name "
            "blocks where the model has none of known names"
        )
    return size


register_method(BottleneckMethod())
