# SPDX-License-Identifier: Apache-2.0
"""NeMo's LoRA on fused linears, and PEFT's on the linears that a transformers model has.

NeMo and Megatron-Bridge adapt four linears of a layer: linear_qkv (query, key and value in one), linear_proj,
linear_fc1 (gate above up) and linear_fc2. An adapter is A, `linear_in` [dim, in], and B, `linear_out`
[out, dim], and adds (alpha / dim) x A^T B^T. The rows of linear_qkv are those of one key-value head after the
other: its queries' heads, its key, its value. There are two variants: "nemo" has one A for all parts of a
linear, "canonical" an adapter for each part. From the first to separate linears A is copied and B is split.
Back, parts with equal A's (bit for bit) become one adapter; others one of as many times the rank ("stacked":
the A's one below the other, each B in columns of its own). Numbers are moved and copied, never computed.

Layouts and names are those of NVIDIA/NeMo (`nemo/lightning/io/state.py`: TransformFns.split_qkv, split_fc1;
`nemo/collections/llm`: HFLlamaPEFTExporter; of release 1:
`scripts/checkpoint_converters/lora_converters/convert_nemo_to_canonical.py`). In layer i of

    release 2, Megatron-Bridge: decoder.layers.i.self_attention.linear_qkv.adapter.linear_in.weight
        canonical: decoder.layers.i.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight
    release 1: model.decoder.layers.i.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight
        canonical: ...self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter.linear_in.weight

Tensors are whole ones, those of a run without tensor parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast.errors import AdapterMismatchError, ConfigError, UnsupportedError
from pyfast.families import Family, FusedLayout, Role, family_of

VARIANTS = ("nemo", "canonical")
RELEASES = (1, 2)
# Linear and its place in a layer, its name in release 1, and that of its parts' adapters there.
_LINEARS = {
    "self_attention.linear_qkv": ("lora_kqv_adapter", "lora_unfused_kqv_adapter"),
    "self_attention.linear_proj": ("lora_dense_attention_adapter", ""),
    "mlp.linear_fc1": ("lora_hto4h_adapter", "lora_unfused_hto4h_adapter"),
    "mlp.linear_fc2": ("lora_4htoh_adapter", ""),
}
_PARTS = {
    "self_attention.linear_qkv": {Role.Q: "q", Role.K: "k", Role.V: "v"},
    "self_attention.linear_proj": {Role.ATTENTION_OUT: ""},
    "mlp.linear_fc1": {Role.GATE: "gate", Role.UP: "up"},
    "mlp.linear_fc2": {Role.DOWN: ""},
}
# Fields of PEFT's config under which A and B alone do not say what is computed, as they do in NeMo.
_REFUSED = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
)
_INITS = ("gaussian", "eva", "orthogonal")  # that leave the base as it was

Factors = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r]."""
Parts = dict[tuple[int, Role], Factors]
"""Layer and role to the adapter of what has that role."""


@dataclass(frozen=True)
class NemoLora:
    """An adapter as NeMo has it.

    Attributes:
        tensors: NeMo's keys to tensors.
        dim: the rank.
        alpha: numerator of the scale alpha / dim.
        dropout: of the adapter's input, in training.
    """

    tensors: Mapping[str, Tensor]
    dim: int
    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True)
class _Linear:
    """A linear that has an adapter: its name in a layer, and the rows of its roles if they are several."""

    name: str
    roles: tuple[Role, ...]
    layout: FusedLayout | None = None


@dataclass(frozen=True)
class _Form:
    """How keys name layers, linears and the two factors."""

    start: str
    pattern: str
    sides: tuple[str, str]
    linears: tuple[_Linear, ...]


def from_nemo(
    adapter: NemoLora, config: Any, *, stack: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter of NeMo's, of either variant and release, in PEFT's form.

    Args:
        adapter: NeMo's.
        config: the transformers config of the base model.
        stack: where a linear of the model is fused and its parts have A's of their own, stack them; the rank
            grows.

    Returns:
        Keys and tensors of an `adapter_model.safetensors`, and the fields of its `adapter_config.json`.

    Raises:
        AdapterMismatchError: a key or a shape that no NeMo adapter of this model has.
        UnsupportedError: a model with other linears than NeMo's, layers with different ones, or A's that
            would need `stack`.
    """
    family = _family(config)
    forms = [_nemo_form(family, config, v, release) for v in VARIANTS for release in RELEASES]
    parts = _read(forms, adapter.tensors, adapter.dim)
    form = _peft_form(family, config)
    tensors, rank = _write(form, parts, adapter.dim, stack)
    layers = sorted({layer for layer, _ in parts})
    roles = {role for _, role in parts}
    lacking = [(i, role) for i in layers for role in roles if (i, role) not in parts]
    if lacking:
        raise UnsupportedError(
            f"the adapter has a part for {lacking[0][1].value} in some layers but none in layer "
            f"{lacking[0][0]}, which PEFT's target_modules cannot say; add one whose linear_out is zero"
        )
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _alpha(adapter.alpha, adapter.dim, rank),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": _targets(form, roles),
    }
    if layers != list(range(config.num_hidden_layers)):
        fields["layers_to_transform"] = layers
    return tensors, fields


def to_nemo(
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    config: Any,
    *,
    variant: str = "nemo",
    release: int = 2,
    stack: bool = False,
) -> NemoLora:
    """A LoRA adapter of PEFT's in NeMo's form.

    Args:
        tensors: keys and tensors of an `adapter_model.safetensors`.
        fields: those of its `adapter_config.json`.
        config: the transformers config of the base model.
        variant: "nemo" or "canonical".
        release: whose keys, 1 or 2.
        stack: where the parts of a linear have different A's, stack them: `dim` and `alpha` become two or
            three times as large, and factors of other linears get zeros up to that rank.

    Raises:
        AdapterMismatchError: a key or a shape that no LoRA adapter of this model's linears has.
        UnsupportedError: the config sets something that NeMo has not; different A's without `stack`; a model
            with other linears than NeMo's.
        ConfigError: no such variant or release, or fields without r and lora_alpha.
    """
    if variant not in VARIANTS or release not in RELEASES:
        raise ConfigError(
            f"to_nemo: variant={variant!r}, release={release!r} must be one of {VARIANTS}, {RELEASES}"
        )
    if fields.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= fields.keys():
        raise ConfigError(
            f"to_nemo: peft_type={fields.get('peft_type')!r} must be 'LORA', with r and lora_alpha"
        )
    for name in _REFUSED:
        if fields.get(name):
            raise UnsupportedError(f"to_nemo: {name}={fields[name]!r} has no counterpart in NeMo")
    init = fields.get("init_lora_weights", True)
    if init not in (True, False, *_INITS):
        raise UnsupportedError(
            f"to_nemo: init_lora_weights={init!r} is for a base that lost a part of its weights, which "
            "NeMo's has not; make it an ordinary adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
    family, dim = _family(config), int(fields["r"])
    parts = _read([_peft_form(family, config)], tensors, dim)
    form = _nemo_form(family, config, variant, release)
    written, rank = _write(form, parts, dim, stack)
    alpha = _alpha(fields["lora_alpha"], dim, rank)
    return NemoLora(written, rank, alpha, float(fields.get("lora_dropout") or 0.0))


def _alpha(alpha: float, before: int, after: int) -> float:
    """The numerator that gives the same scale with a rank that is a multiple; exact."""
    value = alpha * (after // before)
    return int(value) if float(value).is_integer() else value


def _family(config: Any) -> Family:
    kind = getattr(config, "model_type", None)
    family = family_of(kind)
    if family is None or len(family.layers) != 1 or family.cross_attention:
        raise UnsupportedError(
            f"NeMo adapters are converted for decoders of a known family, and model_type {kind!r} is none"
        )
    return family


def _model_linears(family: Family, config: Any) -> tuple[_Linear, ...]:
    found = []
    for path, role in family.roles.items():
        layout = family.fused[role](config) if role in family.fused else None
        found.append(_Linear(path, (role,) if layout is None else tuple(layout.parts), layout))
    return tuple(found)


def _peft_form(family: Family, config: Any) -> _Form:
    start = f"base_model.model.{family.layers[0]}."
    return _Form(start, re.escape(start), ("lora_A", "lora_B"), _model_linears(family, config))


def _nemo_form(family: Family, config: Any, variant: str, release: int) -> _Form:
    there = {role for linear in _model_linears(family, config) for role in linear.roles}
    linears = []
    for place, names in _LINEARS.items():
        parent, parts = place.partition(".")[0], _PARTS[place]
        roles = tuple(role for role in parts if role in there)
        fused = f"{place}.adapter" if release == 2 else f"{parent}.adapter_layer.{names[0]}"
        if variant == "canonical" and len(roles) > 1:
            for role in roles:
                own = f"{fused}.adapter_{parts[role]}"
                if release == 1:
                    own = f"{parent}.adapter_layer.{names[1]}.{parts[role]}_adapter"
                linears.append(_Linear(own, (role,)))
        elif roles:
            layout = _nemo_layout(family, config, roles) if len(roles) > 1 else None
            linears.append(_Linear(fused, roles, layout))
    start = "decoder.layers." if release == 2 else "model.decoder.layers."
    # What is before differs with the wrappers that a state dict was taken from.
    return _Form(start, r"(?:\w+\.)*layers\.", ("linear_in", "linear_out"), tuple(linears))


def _nemo_layout(family: Family, config: Any, roles: tuple[Role, ...]) -> FusedLayout:
    """Rows of linear_qkv or linear_fc1."""
    if Role.UP in roles:
        return FusedLayout(dict.fromkeys(roles, config.intermediate_size))
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if Role.QKV in family.fused:
        layout = family.fused[Role.QKV](config)
        groups = layout.groups * layout.parts[Role.K] // size
    return FusedLayout({Role.Q: heads // groups * size, Role.K: size, Role.V: size}, groups)


def _read(forms: list[_Form], tensors: Mapping[str, Tensor], dim: int) -> Parts:
    """The parts of what lies in one of the forms."""
    linears = {linear.name: linear for form in forms for linear in form.linears}
    sides = forms[0].sides
    key_of = re.compile(rf"{forms[0].pattern}(\d+)\.(.+)\.({'|'.join(sides)})\.weight")
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith("._extra_state"):  # of Transformer Engine, without parameters
            continue
        match = key_of.fullmatch(key)
        if match is None or match[2] not in linears:
            raise AdapterMismatchError(
                f"{key!r} is no key of an adapter of {sorted(linears)} in a layer. Nothing was converted"
            )
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    parts: Parts = {}
    for (layer, name), held in found.items():
        layout = linears[name].layout
        rows = layout.out_features if layout is not None else None
        shapes = [tuple(held[side].shape) if side in held else None for side in sides]
        a, b = (held.get(side) for side in sides)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == dim:
            raise _misshapen(layer, name, shapes, sides, dim, rows)
        if rows is not None and len(b) != rows:
            raise _misshapen(layer, name, shapes, sides, dim, rows)
        roles = linears[name].roles
        if twice := [role.value for role in roles if (layer, role) in parts]:
            raise AdapterMismatchError(
                f"layer {layer}, {name}: there is another adapter of {twice[0]}. Nothing was converted"
            )
        for role in roles:
            parts[layer, role] = a, b if layout is None else b[layout.rows(role).to(b.device)]
    return parts


def _misshapen(
    layer: int, name: str, shapes: list[Any], sides: tuple[str, str], dim: int, rows: int | None
) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"layer {layer}, {name}: {sides[0]} and {sides[1]} have shapes {shapes[0]} and {shapes[1]}, but "
        f"[{dim}, in] and [{rows or 'out'}, {dim}] are needed. Nothing was converted"
    )


def _write(form: _Form, parts: Parts, dim: int, stack: bool) -> tuple[dict[str, Tensor], int]:
    """Keys and tensors of a form, and the rank of all of them."""
    joined: dict[str, Factors] = {}
    for layer in sorted({layer for layer, _ in parts}):
        for linear in form.linears:
            held = {role: parts[layer, role] for role in linear.roles if (layer, role) in parts}
            if held:
                place = f"{layer}.{linear.name}"
                joined[form.start + place] = _join(place, linear.layout, held, stack)
    if not joined:
        raise AdapterMismatchError("there is no tensor to convert")
    rank = max(len(a) for a, _ in joined.values())
    tensors = {}
    for name, (a, b) in joined.items():
        more = rank - len(a)
        # Tensors of their own: files refuse to hold one twice.
        tensors[f"{name}.{form.sides[0]}.weight"] = torch.cat([a, a.new_zeros(more, a.shape[1])])
        tensors[f"{name}.{form.sides[1]}.weight"] = torch.cat([b, b.new_zeros(len(b), more)], 1)
    return tensors, rank


def _join(
    place: str, layout: FusedLayout | None, held: Mapping[Role, Factors], stack: bool
) -> Factors:
    """One adapter of a linear from those of its parts; the rows of parts without one are zeros."""
    (first, b), *others = held.values()
    if layout is None:
        return first, b
    alike = all(torch.equal(first, a) for a, _ in others)
    if not alike and not stack:
        raise UnsupportedError(
            f"layer {place} has one A, but those of {', '.join(role.value for role in held)} differ; stack "
            f"them (stack=True), which makes the rank {len(held)} times as large, or write the canonical "
            "variant. Nothing was converted"
        )
    a = first if alike else torch.cat([a for a, _ in held.values()])
    joined = b.new_zeros(layout.out_features, len(a))
    start = 0
    for role, (_, own) in held.items():
        rows = layout.rows(role).to(own.device)
        joined[rows, start : start + own.shape[1]] = own
        start += 0 if alike else own.shape[1]
    return a, joined


def _targets(form: _Form, roles: set[Role]) -> list[str]:
    """`target_modules` for the linears that have these roles, by the last parts of their names if these are
    no other's."""
    last = [linear.name.rpartition(".")[2] for linear in form.linears]
    return [
        end if last.count(end) == 1 else linear.name
        for linear, end in zip(form.linears, last, strict=True)
        if roles.intersection(linear.roles)
    ]
