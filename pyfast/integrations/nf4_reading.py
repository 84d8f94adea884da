# SPDX-License-Identifier: Apache-2.0
"""How the tensors of a 4-bit checkpoint come together, in the form of transformers' weight converters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfast.errors import QuantStateError, UnsupportedError
from pyfast.methods.quantize import qualified_name
from pyfast.nn import NF4Linear, NF4Tensor, NF4Weight, weight_of
from pyfast.nn.experts import PREFIX, expert_tensors, unserved_experts
from pyfast.nn.nf4 import STATE_KEY, require, unpack_state
from pyfast.ops.nf4 import flat_scales

if TYPE_CHECKING:
    from pyfast.integrations.nf4_quantizer import NF4Quantizer

COMPANIONS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    STATE_KEY,
    "quant_state.bitsandbytes__fp4",
)
_EXPERTS = rf"\.{PREFIX}(\w+)\.weight"


def converters(quantizer: NF4Quantizer) -> list[Any]:
    """Those for the linears and for the experts that our own files hold."""
    from transformers.core_model_loading import WeightConverter

    # Experts' first: a key goes to the first that matches it, and there to the first of its patterns.
    operations: list[Any] = [Read(quantizer, _EXPERTS), Read(quantizer, "weight")]
    return [
        WeightConverter([*_companions([op.stem]), op.stem], target, [op])
        for op, target in zip(operations, [r".\1", "weight"], strict=True)
    ]


def reading_experts(quantizer: NF4Quantizer, conversions: Iterable[Any]) -> list[Any]:
    """A model's own conversions, of which those that stack the experts' matrices take NF4 ones too.

    bitsandbytes under transformers 4 wrote each expert's linears by themselves.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    read = []
    for conversion in conversions:
        steps = [
            (type(op), getattr(op, "dim", None)) for op in getattr(conversion, "operations", ())
        ]
        if steps[:1] == [(MergeModulelist, 0)] and steps[1:] in ([], [(Concatenate, 1)]):
            stems, targets = (
                conversion._original_source_patterns,
                conversion._original_target_patterns,
            )
            operation: Any = ReadExperts(quantizer, conversion)
            made = WeightConverter([*_companions(stems), *stems], list(targets), [operation])
            for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
                if hasattr(conversion, name):
                    setattr(made, name, getattr(conversion, name))
            conversion = made
        read.append(conversion)
    return read


def for_saving(conversions: Iterable[Any]) -> list[Any]:
    """The conversions that a model was loaded by, without what was there for its NF4 weights alone."""
    kept = []
    for conversion in conversions:
        operation = next(iter(getattr(conversion, "operations", ())), None)
        if isinstance(operation, ReadExperts):
            kept.append(operation.dense)
        elif not isinstance(operation, Read):
            kept.append(conversion)
    return kept


def _companions(stems: Iterable[str]) -> list[str]:
    return [f"{stem}.{name}" for stem in stems for name in COMPANIONS]


class Read:
    """What transformers calls with the tensors of one weight; a lone one is dense."""

    def __init__(self, quantizer: NF4Quantizer, stem: str) -> None:
        self.quantizer, self.stem = quantizer, stem
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> Read:
        return Read(self.quantizer, self.stem)  # one for each weight, and one quantizer

    def convert(
        self, tensors: dict[str, Any], *, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        """A dense weight for transformers to set; nothing for an NF4 one, which is put in its place."""
        parts = {key: v[0] if isinstance(v, list) else v for key, v in tensors.items()}
        packed = parts.pop(self.stem, None)
        parts = {key.removeprefix(f"{self.stem}."): part for key, part in parts.items()}
        if self.stem == "weight" and not parts and packed.is_floating_point():
            return {self.stem: packed if self.dtype is None else packed.to(self.dtype)}
        path, _, name = full_layer_name.rpartition(".")
        dense: dict[str, Any] = {}

        def make() -> None:
            if packed is None:
                raise QuantStateError(f"{full_layer_name}: its packed weight is missing")
            weight, shape = unpack_state(packed, parts, module=full_layer_name)
            module = model.get_submodule(path)
            if self.stem != "weight":
                tensor = NF4Tensor(weight, shape, packed.dtype)
                _put_experts(self.quantizer, module, path, name, tensor)
            elif weight_of(module) is None and shape == _shape(module._parameters.get(name)):
                # A linear when it was quantised, and a plain parameter of this transformers' model.
                dtype = self.dtype or module._parameters[name].dtype  # type: ignore[union-attr]
                dense[self.stem] = weight.dense().to(dtype)
            else:
                self._put_linear(model, module, full_layer_name, weight, shape, packed.dtype)

        return self.quantizer.attempt(full_layer_name, kwargs["missing_keys"], make) | dense

    def _put_linear(
        self,
        model: nn.Module,
        module: nn.Module,
        name: str,
        weight: NF4Weight,
        shape: tuple[int, ...],
        storage: torch.dtype,
    ) -> None:
        dense = weight_of(module)
        expected = None if dense is None else (dense.out_features, dense.in_features)
        _check_shape(name, shape, expected)
        layer = NF4Linear(replace(weight, bias=module.bias), storage)  # type: ignore[arg-type]
        layer.replaced = qualified_name(type(module))
        self.quantizer.put_linear(model, module, layer)


class ReadExperts:
    """What transformers calls with the tensors of all experts of a layer, each stored by itself.

    Codes and flat scales stand one after another as they were read, so that saving writes the same bytes.
    Nested scales, which have an offset for each matrix, become flat ones of the same values.
    """

    def __init__(self, quantizer: NF4Quantizer, dense: Any) -> None:
        self.quantizer = quantizer
        self.dense = dense
        """The conversion of dense experts."""
        self.stems: list[str] = dense._original_source_patterns
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> ReadExperts:
        return ReadExperts(self.quantizer, self.dense)

    def convert(
        self, tensors: dict[str, Any], *, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        """A dense tensor for transformers to set; nothing for an NF4 one, which is put in its place."""
        if tensors.keys() <= set(self.stems) and all(
            part.is_floating_point() for parts in tensors.values() for part in parts
        ):
            kwargs |= {"source_patterns": self.stems, "full_layer_name": full_layer_name}
            for operation in self.dense.operations:
                tensors = operation.convert(tensors, model=model, **kwargs)
            dtype = self.dtype or model.get_parameter(full_layer_name).dtype
            return {key: tensor.to(dtype) for key, tensor in tensors.items()}
        path, _, name = full_layer_name.rpartition(".")

        def make() -> None:
            module = model.get_submodule(path)
            shape = _shape(expert_tensors(module).get(name))
            tensor = self._stacked(tensors, full_layer_name, shape)
            _put_experts(self.quantizer, module, path, name, tensor)

        return self.quantizer.attempt(full_layer_name, kwargs["missing_keys"], make)

    def _stacked(
        self, tensors: dict[str, list[Tensor]], name: str, shape: tuple[int, ...] | None
    ) -> NF4Tensor:
        """All experts' matrices in one NF4 tensor."""
        counts = {key: len(tensors.get(key, ())) for key in [*self.stems, *tensors]}
        experts = max(counts.values())
        short = [f"{count} of {key!r}" for key, count in counts.items() if count != experts]
        require(not short, name, f"the file holds {experts} experts, but {', '.join(short)}")
        pieces, group = list[NF4Weight](), len(self.stems)
        for index in range(experts):
            for stem in self.stems:
                where = f"{name}: {stem.strip('.').replace('*', str(index))}"
                pieces.append(_matrix(tensors, stem, index, where))
        kinds = {
            (w.blocksize, w.original_dtype, w.in_features, w.shape, at % group)
            for at, w in enumerate(pieces)
        }
        same = len(kinds) == group and len({kind[:3] for kind in kinds}) == 1
        require(same, name, "its experts differ in shape, blocksize or dtype")
        columns = pieces[0].in_features
        held = (experts, sum(weight.out_features for weight in pieces[:group]), columns)
        _check_shape(name, held, shape)
        scales = [
            flat_scales(w.absmax.reshape(-1), w.nested_absmax, w.nested_offset) for w in pieces
        ]
        stacked = replace(
            pieces[0],
            packed=torch.cat([weight.packed for weight in pieces]),
            absmax=torch.cat(scales),
            shape=(held[0] * held[1], columns),
            nested_absmax=None,
            nested_offset=None,
        )
        return NF4Tensor(stacked, held, tensors[self.stems[0]][0].dtype)


def _matrix(tensors: dict[str, list[Tensor]], stem: str, index: int, where: str) -> NF4Weight:
    """One expert's, of which bytes others can stand behind."""
    start = f"{stem}."
    parts = {k.removeprefix(start): v[index] for k, v in tensors.items() if k.startswith(start)}
    weight, shape = unpack_state(tensors[stem][index], parts, module=where)
    require(len(shape) == 2, where, f"shape {list(shape)} is not [out_features, in_features]")
    if math.prod(shape) % weight.blocksize:
        raise UnsupportedError(
            f"{where} has {math.prod(shape)} weights, no multiple of its blocksize {weight.blocksize}, so "
            "that the experts' bytes do not add up; quantise the dense model by pyfast.NF4Config"
        )
    return weight


def _put_experts(
    quantizer: NF4Quantizer, module: nn.Module, path: str, name: str, tensor: NF4Tensor
) -> None:
    held = expert_tensors(module).get(name)
    _check_shape(f"{path}.{name}", tensor.shape, _shape(held))
    reason = unserved_experts(module, {name: held}, tensor.blocksize)  # type: ignore[dict-item]
    if reason:
        raise UnsupportedError(f"{path}.{name} cannot be NF4: {reason}")
    quantizer.put_experts(module, name, tensor)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    if shape != expected:
        there = "has no place for it" if expected is None else f"needs {list(expected)}"
        raise QuantStateError(
            f"{name}: the checkpoint holds an NF4 weight of shape {list(shape)}, the model {there}; "
            "load the checkpoint with the config.json that was saved beside it"
        )
