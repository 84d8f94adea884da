# SPDX-License-Identifier: Apache-2.0
"""LoRA: y = x W^T + s * dropout(x) A^T B^T (Hu et al., 2021), s = alpha / r, rsLoRA alpha / sqrt(r).

With an NF4 base the same method is QLoRA (Dettmers et al., 2023), with learned norms DoRA, see `nn.dora`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import ConfigError, UnsupportedError
from pyfast.methods.base import Method, Plan, refuse_meta, register_method, replace_modules
from pyfast.methods.describe import adapter_fields
from pyfast.methods.lora_places import (
    embedding_modules,
    experts_left_out,
    find_places,
    parameter_targets,
    tied,
)
from pyfast.methods.pissa import PrincipalParts, is_pissa
from pyfast.methods.saved import plan_saved
from pyfast.methods.targets import (
    ALL_LINEAR,
    match_saved,
    pattern_values,
    served_weight,
)
from pyfast.nn import AdapterLayer, Weight, weight_of
from pyfast.nn.adapter_layer import has_hooks, link_of
from pyfast.nn.dora import DoraMagnitude, dora_joined, dora_linear, row_norms
from pyfast.nn.embedding import LoraEmbedding
from pyfast.nn.expert_lora import LoraExperts
from pyfast.nn.group import GroupMember, Part, part_of

_MAX_ALPHA = 1e9
_MAX_RANK = 1 << 16


@dataclass
class LoraConfig:
    """LoRA's settings; names, defaults and meaning are those of PEFT's `LoraConfig`.

    Attributes:
        r: rank R.
        target_modules: names that end a module's path, a regular expression for the whole path, or
            "all-linear"; None takes the family's default. Embeddings are adapted where they are named, and
            "experts", alone too, means the 3-D parameters of a mixture's experts.
        target_parameters: names that end a path of such a parameter. Beside them `target_modules=None`
            means no modules.
        exclude_modules: same forms; removed from the targets.
        lora_alpha: numerator of the scale.
        lora_dropout: dropout of the adapter's input while training.
        use_rslora: scale alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023).
        modules_to_save: names of modules trained whole and saved with the adapter.
        init_lora_weights: True: A uniform (Kaiming, a = sqrt 5), B zero; "gaussian": A normal with
            standard deviation 1 / r, B zero; False: both as `nn.Linear` (for tests); "pissa" or
            "pissa_niter_<n>": the principal part of each weight, which loses it (see `methods.pissa`).
        layers_to_transform: layer indices to adapt; None means all.
        layers_pattern: name of the list of layers for `layers_to_transform`.
        rank_pattern: end of a module's path (regular expression) to its own rank.
        alpha_pattern: the same for lora_alpha.
        bias: "none"; others are refused.
        use_dora: learn the norm of each row of W + s B A as well (DoRA; Liu et al., 2024).
        fan_in_fan_out: accepted; the layout is read off the module.
        task_type, base_model_name_or_path, revision, inference_mode: written to the adapter's file.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    use_dora: bool = False
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def check(self) -> None:
        """Raise ConfigError or UnsupportedError for values that cannot be served, or with which nothing could
        be trained; `inference_mode`, which saved adapters have, allows the latter."""
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"LoraConfig: {name}={value!r} must be True or False")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ConfigError(f"LoraConfig: {name}={value!r} must be a dict")
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
                raise ConfigError(
                    f"LoraConfig: rank {name}={rank!r} must be an integer of at least 1 and at most "
                    f"{_MAX_RANK}"
                )
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
            idle = alpha == 0 and not self.inference_mode
            if not number or idle or not abs(alpha) <= _MAX_ALPHA:
                raise ConfigError(
                    f"LoraConfig: {name}={alpha!r} must be a number other than 0 of at most {_MAX_ALPHA:g}"
                )
        number = isinstance(self.lora_dropout, (int, float))
        idle = self.lora_dropout == 1.0 and not self.inference_mode
        if not number or idle or not 0.0 <= self.lora_dropout <= 1.0:
            raise ConfigError(f"LoraConfig: lora_dropout={self.lora_dropout!r} must be in [0, 1)")
        init = self.init_lora_weights
        if init not in (True, False, "gaussian") and not is_pissa(init):
            raise UnsupportedError(
                f"LoraConfig: init_lora_weights={init!r} is not served; use True, False, 'gaussian', "
                "'pissa' or 'pissa_niter_<n>'"
            )
        if self.bias != "none":
            raise UnsupportedError(f"LoraConfig: bias={self.bias!r} is not served; use bias='none'")

    def ranks_and_scales(
        self, paths: list[str], *, allow_unmatched: bool = False
    ) -> tuple[dict[str, int], dict[str, float]]:
        """R and s for the modules at these paths."""
        found = pattern_values(
            "rank_pattern", self.rank_pattern, paths, self.r, allow_unmatched=allow_unmatched
        )
        alphas = pattern_values(
            "alpha_pattern",
            self.alpha_pattern,
            paths,
            self.lora_alpha,
            allow_unmatched=allow_unmatched,
        )
        ranks = {path: int(rank) for path, rank in found.items()}
        scales = {
            path: alphas[path] / (math.sqrt(rank) if self.use_rslora else rank)
            for path, rank in ranks.items()
        }
        return ranks, scales


class LoraLinear(GroupMember, AdapterLayer):
    """A linear layer of any weight format with LoRA adapters; parameters `lora_A.<name>.weight` [R, K],
    `lora_B.<name>.weight` [N, R] and, for DoRA, `lora_magnitude_vector.<name>.weight` [N]."""

    containers = ("lora_A", "lora_B", "lora_magnitude_vector")
    op = "lora_linear"
    by_sample = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def add(
        self,
        name: str,
        rank: int,
        scale: float,
        dropout: float,
        init: bool | str,
        dtype: torch.dtype,
        dora: bool = False,
    ) -> None:
        """Add an adapter; see `LoraConfig.init_lora_weights`. DoRA's norms start as those of W + s B A."""
        weight = self.base_weight
        a = nn.Linear(weight.in_features, rank, bias=False, device=weight.device, dtype=dtype)
        b = nn.Linear(rank, weight.out_features, bias=False, device=weight.device, dtype=dtype)
        if init is not False:
            if init == "gaussian":
                nn.init.normal_(a.weight, std=1 / rank)
            else:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
        self.lora_A[name], self.lora_B[name] = a, b
        self.scaling[name], self.dropout[name] = scale, dropout
        if dora:
            self.lora_magnitude_vector[name] = DoraMagnitude(self._norms(name).to(dtype))

    def remove(self, name: str) -> None:
        super().remove(name)
        self.scaling.pop(name, None)
        self.dropout.pop(name, None)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """As the base class, with PEFT's file key for the norms: `lora_magnitude_vector` alone."""
        for key, parameter in super().adapter_tensors(name):
            norms = key == "lora_magnitude_vector.weight"
            yield ("lora_magnitude_vector" if norms else key), parameter

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def _magnitude(self, name: str) -> Any:
        """The `DoraMagnitude` of an adapter; None where it has no norms of its own."""
        return self.lora_magnitude_vector._modules.get(name)

    def _norms(self, name: str) -> Tensor:
        """||W + s B A|| of each row."""
        weight, factors = self.base_weight, self._factors(name)
        if any(tensor.is_meta for tensor in factors):
            raise UnsupportedError(
                f"DoRA needs the norms of W + s B A, but adapter {name!r} lies on the meta device, where "
                "offloading keeps what is not in use; leave adapters on their device"
            )
        return row_norms(weight, *factors, self.scaling[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] to [..., N] with every active adapter, the first one fused with the base; or with each
        sample's."""
        if self.samples is not None and self.enabled:
            frozen = self.base_layer(x, *args, **kwargs)
            return self.samples.adapted(frozen, self.lora_A, self._joined, x)
        if not self.enabled or not self.active or self.merged:
            out: Tensor = self.base_layer(x, *args, **kwargs)
            return out
        y: Tensor | None
        first, *others = self.active
        base, magnitude = self.base_layer, self._magnitude(first)
        scale, dropout = self.scaling[first], self.dropout[first] if self.training else 0.0
        group = None if dropout or args or kwargs else self.live_group()
        if group is not None:
            y = group.output(self, x, self.lora_part())
            if y is not None:
                return y
        a: Any = self.lora_A[first]
        b: Any = self.lora_B[first]
        # Hooks that watch a part or serve it (offloading): then the parts are called.
        hooked = has_hooks(base) or has_hooks(a) or has_hooks(b)
        hooked = hooked or (magnitude is not None and has_hooks(magnitude))
        weight = None if hooked else weight_of(base)
        if weight is None:
            y, others = base(x, *args, **kwargs), self.active
        else:
            if magnitude is None:
                y = weight.lora_linear(x, a.weight, b.weight, scale, dropout)
            else:
                norms = magnitude.weight
                y = dora_linear(weight, x, a.weight, b.weight, scale, dropout, norms, base)
        for name in others:
            y = self._joined(name, y, x)
        return y

    def frozen_layer(self) -> nn.Module:
        return self.base_layer

    def lora_part(self) -> Part | None:
        if self._disabled or len(self.active) != 1 or self.merged:
            return None
        (name,) = self.active
        held: Any = self._modules  # nn.Module's own search costs half a microsecond each time
        if name in held["lora_magnitude_vector"]._modules:
            return None
        a, b = held["lora_A"]._modules[name], held["lora_B"]._modules[name]
        scale, dropout = self.scaling[name], self.dropout[name]
        drops = self.training and dropout > 0.0
        return part_of(self, held["base_layer"], a, b, scale, dropout, drops)

    def _joined(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """A result with one more adapter in it, by calling the modules that hold its parts."""
        a: Any = self.lora_A[name]
        dropped = nn.functional.dropout(x.to(a.weight.dtype), self.dropout[name], self.training)
        low: Tensor = self.lora_B[name](a(dropped))
        addition, magnitude = low * self.scaling[name], self._magnitude(name)
        if magnitude is None:
            return y + addition.to(y.dtype)
        scale, product = magnitude(self._norms(name)), None
        if self.training and self.dropout[name] > 0.0:
            product = self.base_layer.forward(dropped.to(x.dtype))  # hooks have seen x already
        return dora_joined(y, product, addition, scale, self.bias).to(y.dtype)

    def merge_into(self, matrix: Tensor, name: str) -> Tensor:
        """W + s B A, for DoRA scaled to the learned norms."""
        merged = matrix + self.delta(name)
        magnitude = self._magnitude(name)
        if magnitude is not None:
            scale: Tensor = magnitude(self._norms(name))
            merged = merged * scale[:, None]
        return merged

    def delta(self, name: str) -> Tensor:
        """s B A in float32, or float64 where the factors are."""
        a, b = self._factors(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.to(wide) @ a.to(wide)) * self.scaling[name]


class LoraMethod(Method):
    """Wraps the target linears in `LoraLinear` and freezes everything else."""

    name = "LoRA"
    config_type = LoraConfig
    peft_type = "LORA"

    def completed(self, values: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """A saved adapter has its values: how they began matters only where the base weights changed too."""
        if values.get("inference_mode") and values.get("init_lora_weights") == "orthogonal":
            values["init_lora_weights"] = True
        return values

    def plan(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        *,
        allow_unmatched: bool,
        autocast_adapter_dtype: bool,
    ) -> Plan:
        """Match the targets; see `Method.plan`."""
        config.check()
        whole = match_saved(model, config.modules_to_save, allow_unmatched=allow_unmatched)
        places = find_places(model, config, whole, allow_unmatched)
        ranks, scales = config.ranks_and_scales(places.paths(), allow_unmatched=allow_unmatched)
        principal = PrincipalParts(model, config, places, ranks, scales)
        saved = plan_saved(model, whole, adapter_name)
        shapes = {**saved.shapes, **places.shapes(ranks)}
        for path, module in places.linears.items():
            weight = served_weight(path, module)
            shapes[f"{path}.lora_A.weight"] = (ranks[path], weight.in_features)
            shapes[f"{path}.lora_B.weight"] = (weight.out_features, ranks[path])
            if config.use_dora:
                refuse_meta("use_dora", [(f"{path}.weight", module.weight)])  # type: ignore[list-item]
                shapes[f"{path}.lora_magnitude_vector"] = (weight.out_features,)

        def add(path: str, layer: LoraEmbedding | LoraExperts) -> None:
            dtype = _adapter_dtype(layer.base_weight, autocast_adapter_dtype)
            layer.add(adapter_name, ranks[path], scales[path], config.init_lora_weights, dtype)

        def commit() -> None:
            wrapped = places.put(model, add)
            for path, base in places.linears.items():
                layer = link_of(model.get_submodule(path), LoraLinear)
                if layer is None:  # below the layers of other methods, whose base it becomes
                    layer = wrapped[base] = LoraLinear(base)
                    layer.train(base.training)
                layer.add(
                    adapter_name,
                    ranks[path],
                    scales[path],
                    config.lora_dropout,
                    config.init_lora_weights,
                    _adapter_dtype(layer.base_weight, autocast_adapter_dtype),
                    config.use_dora,
                )
            replace_modules(model, wrapped.get)
            saved.commit()
            principal.take_out(model, adapter_name)

        warnings = saved.warnings + tied(model, places.embeddings)
        if config.target_modules == ALL_LINEAR:
            warnings += experts_left_out(model, [*whole, *places.experts])
        return Plan(shapes, commit, warnings, undo=principal.undo)

    def fields(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, Any]:
        """As PEFT writes them; see `Method.fields`."""
        fields = adapter_fields(model, config, adapter_name, embedding_modules(model))
        alpha = config.lora_alpha
        fields["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
        fields["target_parameters"] = parameter_targets(model, adapter_name)
        return fields | {"layers_to_transform": None, "layers_pattern": None}


def _adapter_dtype(weight: Weight, autocast: bool) -> torch.dtype:
    """PEFT's rule: adapters of half-precision (and quantised) weights are float32 unless told not to be."""
    return torch.float32 if autocast and weight.dtype.itemsize <= 2 else weight.dtype


register_method(LoraMethod())
