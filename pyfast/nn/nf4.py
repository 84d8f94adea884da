# SPDX-License-Identifier: Apache-2.0
"""Linear layers and other tensors in NF4, and bitsandbytes' state-dict form of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyfast import ops
from pyfast.errors import QuantStateError
from pyfast.nn.weight import NF4Weight, Weight, register_format
from pyfast.ops._check import BLOCKSIZES, NEST_BLOCK, check_quantized
from pyfast.ops._nf4_format import NEST_MAP, NF4_CODE

STATE_KEY = "quant_state.bitsandbytes__nf4"
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_MAX_STATE_BYTES = 1 << 16
STORAGES = {"uint8": torch.uint8, **_DTYPES}
"""The dtypes in which packed bytes are stored, by bitsandbytes' names."""
_LARGEST = 3.4e38


class NF4Tensor(nn.Module):
    """A frozen tensor of any shape in NF4.

    The state dict holds bitsandbytes' keys and bytes: `weight` uint8 [ceil(numel / 2), 1], or the same bytes
    in the `quant_storage` dtype that they were read in; `weight.absmax`, `weight.quant_map`, for nested
    scales `weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`
    (UTF-8 JSON). On the meta device, where there are no scales to write, it holds `weight` alone.
    Scales stay float32 through `.half()` and `.to(dtype)`, which change what the tensor counts as when it is
    made dense.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        weight: NF4Weight,
        shape: tuple[int, ...] | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = shape or weight.shape
        self.quant_storage = quant_storage
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.adopt(weight)

    def adopt(self, weight: NF4Weight) -> None:
        """Take over an NF4 weight's scales and facts; its packed bytes are those of `weight` already."""
        self.blocksize = weight.blocksize
        self.original_dtype = weight.original_dtype
        self.register_buffer("absmax", weight.absmax, persistent=False)
        self.register_buffer("nested_absmax", weight.nested_absmax, persistent=False)
        self.register_buffer("nested_offset", weight.nested_offset, persistent=False)

    def nf4_weight(self) -> NF4Weight:
        """A view of this module's tensors as a matrix, all axes but the last one flattened."""
        *_, columns = self.shape
        return NF4Weight(
            self.weight.data,
            self.absmax,
            (math.prod(self.shape[:-1]), columns),
            self.original_dtype,
            self.blocksize,
            self.nested_absmax,
            self.nested_offset,
        )

    def dense(self) -> Tensor:
        """The tensor, dequantised to the dtype that it counts as."""
        return self.nf4_weight().dense().view(self.shape)

    def extra_repr(self) -> str:
        """Shape, block size and whether scales are nested."""
        return (
            f"shape={list(self.shape)}, blocksize={self.blocksize}, "
            f"nested={self.nested_absmax is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        # The dtype that a dense weight would have after this.
        probe = torch.empty(1, dtype=self.original_dtype, device=self.weight.device)
        self.original_dtype = fn(probe).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_meta:
            return
        if self.quant_storage != torch.uint8:
            stored = self.weight.data.view(-1).view(self.quant_storage).view(-1, 1)
            destination[f"{prefix}weight"] = stored
        for name, value in pack_state(self.nf4_weight(), self.shape).items():
            destination[f"{prefix}weight.{name}"] = value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        read = self._read(state_dict, prefix)
        for key in [key for key in state_dict if key.startswith(f"{prefix}weight.")]:
            del state_dict[key]
        if read is not None:
            weight, storage = read
            local_metadata = args[0] if args else kwargs.get("local_metadata", {})
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = weight.device if assign else self.weight.device
            for name in ("absmax", "nested_absmax", "nested_offset"):
                value = getattr(weight, name)
                self._buffers[name] = None if value is None else value.to(device, copy=True)
            self.blocksize, self.original_dtype = weight.blocksize, weight.original_dtype
            self.quant_storage = storage
            state_dict[f"{prefix}weight"] = weight.packed
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _read(
        self, state_dict: Mapping[str, Any], prefix: str
    ) -> tuple[NF4Weight, torch.dtype] | None:
        """This module's weight in a state dict, and the dtype that it is stored in; None if it is not there.

        Raises:
            QuantStateError: it is damaged, or of another shape.
        """
        start = f"{prefix}weight."
        if start[:-1] not in state_dict:
            return None
        packed: Any = state_dict[start[:-1]]
        parts = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
        weight, shape = unpack_state(packed, parts, module=prefix.rstrip(".") or "NF4Linear")
        if shape != self.shape:
            raise QuantStateError(
                f"{prefix}weight: the quantised weight has shape {list(shape)}, this layer "
                f"{list(self.shape)}; load the checkpoint of this model"
            )
        return weight, packed.dtype


def guard_states(root: nn.Module) -> None:
    """Have a module's `load_state_dict` check all NF4 weights below it before it changes the first."""
    if not vars(root).get("_guards_nf4_states"):
        root.register_load_state_dict_pre_hook(_check_states)  # type: ignore[no-untyped-call]
        root._guards_nf4_states = True  # type: ignore[assignment]


def _check_states(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for path, module in root.named_modules():
        if isinstance(module, NF4Tensor):
            module._read(state_dict, f"{prefix}{path}." if path else prefix)


class NF4Linear(NF4Tensor):
    """y = x W^T + bias with W [out_features, in_features] in NF4, frozen; y has the dtype of x."""

    def __init__(self, weight: NF4Weight, quant_storage: torch.dtype = torch.uint8) -> None:
        super().__init__(weight, quant_storage=quant_storage)
        self.replaced = ""
        """The qualified name of the class of the layer in whose place this one is; empty if unknown."""
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bias = (
            None if weight.bias is None else nn.Parameter(weight.bias, weight.bias.requires_grad)
        )

    @classmethod
    def from_weight(cls, weight: Weight, *, blocksize: int = 64, nested: bool = True) -> NF4Linear:
        """Quantise a weight of any format.

        Args:
            weight: W [N, K]; its bias, if any, is kept as it is.
            blocksize: elements that share a scale.
            nested: store the scales in 8 bits ("double quantisation").
        """
        made = nf4_of(weight.dense(), blocksize=blocksize, nested=nested)
        return cls(replace(made, bias=weight.bias))

    def nf4_weight(self) -> NF4Weight:
        """A view of this layer's tensors."""
        return NF4Weight(
            self.weight.data,
            self.absmax,
            (self.out_features, self.in_features),
            self.original_dtype,
            self.blocksize,
            self.nested_absmax,
            self.nested_offset,
            self.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], see `ops.nf4_linear`."""
        return self.nf4_weight().linear(x)

    def extra_repr(self) -> str:
        """Sizes, block size and whether scales are nested."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={self.blocksize}, "
            f"nested={self.nested_absmax is not None}"
        )


def nf4_of(tensor: Tensor, *, blocksize: int, nested: bool) -> NF4Weight:
    """Quantise a tensor of any shape, as a matrix with all axes but the last one flattened."""
    packed, absmax = ops.nf4_quantize(tensor, blocksize)
    scales = ops.nf4_nest(absmax) if nested else ops.NestedScales(absmax, None, None)  # type: ignore[arg-type]
    shape = (math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return NF4Weight(
        packed, scales.codes, shape, tensor.dtype, blocksize, scales.absmax, scales.offset
    )


def pack_state(weight: NF4Weight, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors that stand beside `weight` in bitsandbytes' state dict, keys without the prefix."""
    facts: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.original_dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    parts = {"absmax": weight.absmax, "quant_map": NF4_CODE.to(weight.device, copy=True)}
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        parts["nested_absmax"] = weight.nested_absmax
        parts["nested_quant_map"] = NEST_MAP.to(weight.device, copy=True)
        facts["nested_blocksize"] = NEST_BLOCK
        facts["nested_dtype"] = "float32"
        facts["nested_offset"] = weight.nested_offset.item()
    blob = json.dumps(facts).encode()
    parts[STATE_KEY] = torch.frombuffer(bytearray(blob), dtype=torch.uint8).to(weight.device)
    return parts


def require(ok: bool, module: str, what: str) -> None:
    """Raise QuantStateError, naming the module and what is wrong, unless it is ok."""
    if not ok:
        raise QuantStateError(
            f"{module}: {what}; the file is damaged or not an NF4 checkpoint. The layer is unchanged"
        )


def unpack_state(
    packed: Tensor, parts: dict[str, Tensor], *, module: str
) -> tuple[NF4Weight, tuple[int, ...]]:
    """Read bitsandbytes' state-dict form, checking every part before anything is used.

    Args:
        packed: the packed weight in any storage dtype.
        parts: the tensors beside it, keys without the `weight.` prefix.
        module: name for error messages.

    Returns:
        The weight as a matrix, and its shape.

    Raises:
        QuantStateError: a part is missing, unknown, of the wrong length, or not finite.
    """
    known = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY}
    unknown = sorted(set(parts) - known)
    require(not unknown, module, f"unknown quantisation keys {unknown}")
    _check_kinds(packed, parts, module)
    missing = sorted({"absmax", "quant_map", STATE_KEY} - set(parts))
    require(not missing, module, f"quantisation keys {missing} are missing")
    facts = _read_facts(parts[STATE_KEY], module)
    shape = tuple(facts["shape"])
    require(same_values(parts["quant_map"], NF4_CODE), module, "quant_map is not NF4's")
    absmax, nested_absmax, offset = parts["absmax"], None, None
    if "nested_blocksize" in facts:
        nested_absmax, offset = _nested_scales(parts, facts["nested_offset"], module)
    else:
        require("nested_absmax" not in parts, module, "quant_state lacks nested_blocksize")
    weight = NF4Weight(
        # A single element counts as contiguous whatever its stride is.
        packed.contiguous().as_strided((packed.numel(),), (1,)).view(torch.uint8).view(-1, 1),
        absmax,
        (math.prod(shape[:-1]), shape[-1]),
        _DTYPES[facts["dtype"]],
        facts["blocksize"],
        nested_absmax,
        offset,
    )
    check_weight(weight, module)
    return weight, shape


def check_weight(weight: NF4Weight, module: str) -> None:
    """Raise QuantStateError unless the parts of an NF4 weight fit together and all scales are finite."""
    nested, offset, absmax = weight.nested_absmax, weight.nested_offset, weight.absmax
    scales = absmax if nested is None else nested
    require(scales.dtype == torch.float32, module, f"scales are {scales.dtype}, not float32")
    require(bool(torch.isfinite(scales).all()), module, "scales hold NaN or infinity")
    require(weight.blocksize in BLOCKSIZES, module, f"blocksize is {weight.blocksize!r}")
    if nested is not None and offset is not None:
        codes = absmax.dtype == torch.uint8
        require(codes, module, f"nested scales are coded in {absmax.dtype}, not uint8")
        require(offset.numel() == 1, module, f"nested_offset has {offset.numel()} values")
        largest = abs(float(offset)) + (float(nested.abs().amax()) if nested.numel() else 0.0)
        require(largest < _LARGEST, module, "nested scales are not finite")
    check_quantized(
        module, weight.packed, absmax, math.prod(weight.shape), weight.blocksize, nested, offset
    )


def _check_kinds(packed: Tensor, parts: dict[str, Tensor], module: str) -> None:
    """Every part is a plain tensor with values, on one device; the packed one has a dtype that is stored."""
    for name, part in {"weight": packed, **parts}.items():
        plain = isinstance(part, Tensor) and part.layout == torch.strided and not part.is_meta
        require(plain, module, f"{name} is not a dense tensor with values")
        require(part.device == packed.device, module, f"{name} is on {part.device}")
    require(packed.dtype in STORAGES.values(), module, f"the packed weight is {packed.dtype}")


def same_values(values: Tensor, expected: Tensor) -> bool:
    """Whether a table is the one that the format has."""
    return values.dtype == expected.dtype and torch.equal(values.cpu(), expected)


def _nested_scales(parts: dict[str, Tensor], offset: float, module: str) -> tuple[Tensor, Tensor]:
    absent = sorted({"nested_absmax", "nested_quant_map"} - set(parts))
    require(not absent, module, f"quantisation keys {absent} are missing")
    same = same_values(parts["nested_quant_map"], NEST_MAP)
    require(same, module, "nested_quant_map is not the signed dynamic map")
    device = parts["absmax"].device
    return parts["nested_absmax"], torch.tensor(offset, dtype=torch.float32, device=device)


def _read_facts(blob: Tensor, module: str) -> dict[str, Any]:
    require(
        blob.dtype == torch.uint8 and blob.numel() <= _MAX_STATE_BYTES,
        module,
        "quant_state is not bytes",
    )
    try:
        facts = json.loads(bytes(blob.cpu().reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise QuantStateError(
            f"{module}: quant_state is not JSON ({error}). The layer is unchanged"
        ) from None
    require(isinstance(facts, dict), module, "quant_state is not a JSON object")
    require(
        facts.get("quant_type") == "nf4",
        module,
        f"quant_type is {facts.get('quant_type')!r}, not 'nf4'",
    )
    require(
        isinstance(facts.get("dtype"), str) and facts["dtype"] in _DTYPES,
        module,
        f"dtype {facts.get('dtype')!r} is not a float type",
    )
    shape = facts.get("shape")
    ok = isinstance(shape, list) and len(shape) > 1 and all(type(n) is int and n > 0 for n in shape)
    require(ok, module, f"shape {shape!r} is not [out_features, in_features]")
    blocksize = facts.get("blocksize")
    ok = type(blocksize) is int and blocksize in BLOCKSIZES
    require(ok, module, f"blocksize {blocksize!r} is not one of {BLOCKSIZES}")
    if "nested_blocksize" in facts:
        nested, dtype = facts["nested_blocksize"], facts.get("nested_dtype", "float32")
        require(nested == NEST_BLOCK, module, f"nested_blocksize is {nested!r}, not {NEST_BLOCK}")
        require(dtype == "float32", module, f"nested_dtype is {dtype!r}, not 'float32'")
        offset = facts.get("nested_offset")
        finite = type(offset) in (int, float) and abs(offset) < _LARGEST
        require(finite, module, f"nested_offset {offset!r} is not a finite number")
    checked: dict[str, Any] = facts
    return checked


register_format("pyfast.nn.nf4.NF4Linear", lambda module: module.nf4_weight())  # type: ignore[operator]
