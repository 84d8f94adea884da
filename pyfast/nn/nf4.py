# SPDX-License-Identifier: Apache-2.0
"""A linear layer that stores its weight in NF4, and bitsandbytes' state-dict form of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

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


class NF4Linear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] in NF4; frozen.

    The state dict holds bitsandbytes' keys and bytes: `weight` uint8 [ceil(N K / 2), 1],
    `weight.absmax`, `weight.quant_map`, for nested scales `weight.nested_absmax` and
    `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (UTF-8 JSON).
    Scales stay float32 through `.half()` and `.to(dtype)`, which change what the weight counts as when it is
    made dense; the output has the input's dtype.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, weight: NF4Weight) -> None:
        super().__init__()
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.bias = (
            None if weight.bias is None else nn.Parameter(weight.bias, weight.bias.requires_grad)
        )
        self._adopt(weight)

    def _adopt(self, weight: NF4Weight) -> None:
        self.blocksize = weight.blocksize
        self.original_dtype = weight.original_dtype
        self.register_buffer("absmax", weight.absmax, persistent=False)
        self.register_buffer("nested_absmax", weight.nested_absmax, persistent=False)
        self.register_buffer("nested_offset", weight.nested_offset, persistent=False)

    @classmethod
    def from_weight(cls, weight: Weight, *, blocksize: int = 64, nested: bool = True) -> NF4Linear:
        """Quantise a weight of any format.

        Args:
            weight: W [N, K]; its bias, if any, is kept as it is.
            blocksize: elements that share a scale.
            nested: store the scales in 8 bits ("double quantisation").
        """
        packed, absmax = ops.nf4_quantize(weight.dense(), blocksize)
        scales = ops.nf4_nest(absmax) if nested else ops.NestedScales(absmax, None, None)  # type: ignore[arg-type]
        return cls(
            NF4Weight(
                packed,
                scales.codes,
                (weight.out_features, weight.in_features),
                weight.dtype,
                blocksize,
                scales.absmax,
                scales.offset,
                weight.bias,
            )
        )

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
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
        for name, value in pack_state(self.nf4_weight()).items():
            destination[f"{prefix}weight.{name}"] = value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        start = f"{prefix}weight."
        parts = {
            key[len(start) :]: state_dict.pop(key)
            for key in list(state_dict)
            if key.startswith(start)
        }
        packed = state_dict.get(f"{prefix}weight")
        if packed is not None:
            weight = unpack_state(packed, parts, module=prefix.rstrip(".") or "NF4Linear")
            if weight.shape != (self.out_features, self.in_features):
                raise QuantStateError(
                    f"{prefix}weight: the quantised weight has shape {list(weight.shape)}, this layer "
                    f"[{self.out_features}, {self.in_features}]; load the checkpoint of this model"
                )
            local_metadata = args[0] if args else kwargs.get("local_metadata", {})
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = weight.device if assign else self.weight.device
            for name in ("absmax", "nested_absmax", "nested_offset"):
                value = getattr(weight, name)
                self._buffers[name] = None if value is None else value.to(device, copy=True)
            self.blocksize, self.original_dtype = weight.blocksize, weight.original_dtype
            state_dict[f"{prefix}weight"] = weight.packed
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def pack_state(weight: NF4Weight) -> dict[str, Tensor]:
    """The tensors that stand beside `weight` in bitsandbytes' state dict, keys without the prefix."""
    facts: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.original_dtype).removeprefix("torch."),
        "shape": list(weight.shape),
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


def _require(ok: bool, module: str, what: str) -> None:
    if not ok:
        raise QuantStateError(
            f"{module}: {what}; the file is damaged or not an NF4 checkpoint. The layer is unchanged"
        )


def unpack_state(
    packed: Tensor, parts: dict[str, Tensor], *, module: str, bias: Tensor | None = None
) -> NF4Weight:
    """Read bitsandbytes' state-dict form, checking every part before anything is used.

    Args:
        packed: the packed weight in any storage dtype.
        parts: the tensors beside it, keys without the `weight.` prefix.
        module: name for error messages.
        bias: kept in the result.

    Raises:
        QuantStateError: a part is missing, unknown, of the wrong length, or not finite.
    """
    known = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY}
    unknown = sorted(set(parts) - known)
    _require(not unknown, module, f"unknown quantisation keys {unknown}")
    _require(packed.ndim > 0, module, "the packed weight is a scalar")
    missing = sorted({"absmax", "quant_map", STATE_KEY} - set(parts))
    _require(not missing, module, f"quantisation keys {missing} are missing")
    facts = _read_facts(parts[STATE_KEY], module)
    nested = "nested_blocksize" in facts
    shape = tuple(facts["shape"])
    _require(
        torch.equal(parts["quant_map"].cpu().float(), NF4_CODE), module, "quant_map is not NF4's"
    )
    absmax, nested_absmax, offset = parts["absmax"], None, None
    if nested:
        absent = sorted({"nested_absmax", "nested_quant_map"} - set(parts))
        _require(not absent, module, f"quantisation keys {absent} are missing")
        same = torch.equal(parts["nested_quant_map"].cpu().float(), NEST_MAP)
        _require(same, module, "nested_quant_map is not the signed dynamic map")
        nested_absmax = parts["nested_absmax"]
        codes = absmax.dtype == torch.uint8
        _require(codes, module, f"nested scales are coded in {absmax.dtype}, not uint8")
        offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=absmax.device)
    scales = absmax if nested_absmax is None else nested_absmax
    _require(scales.dtype == torch.float32, module, f"scales are {scales.dtype}, not float32")
    _require(bool(torch.isfinite(scales).all()), module, "scales hold NaN or infinity")
    packed = packed.contiguous().view(torch.uint8).reshape(-1, 1)
    check_quantized(
        module, packed, absmax, shape[0] * shape[1], facts["blocksize"], nested_absmax, offset
    )
    return NF4Weight(
        packed,
        absmax,
        shape,
        _DTYPES[facts["dtype"]],
        facts["blocksize"],
        nested_absmax,
        offset,
        bias,
    )


def _read_facts(blob: Tensor, module: str) -> dict[str, Any]:
    _require(
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
    _require(isinstance(facts, dict), module, "quant_state is not a JSON object")
    _require(
        facts.get("quant_type") == "nf4",
        module,
        f"quant_type is {facts.get('quant_type')!r}, not 'nf4'",
    )
    _require(
        isinstance(facts.get("dtype"), str) and facts["dtype"] in _DTYPES,
        module,
        f"dtype {facts.get('dtype')!r} is not a float type",
    )
    shape = facts.get("shape")
    ok = (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    )
    _require(ok, module, f"shape {shape!r} is not [out_features, in_features]")
    blocksize = facts.get("blocksize")
    ok = type(blocksize) is int and blocksize in BLOCKSIZES
    _require(ok, module, f"blocksize {blocksize!r} is not one of {BLOCKSIZES}")
    if "nested_blocksize" in facts:
        nested = facts["nested_blocksize"]
        _require(nested == NEST_BLOCK, module, f"nested_blocksize is {nested!r}, not {NEST_BLOCK}")
        offset = facts.get("nested_offset")
        finite = type(offset) in (int, float) and abs(offset) < 3.4e38
        _require(finite, module, f"nested_offset {offset!r} is not a finite number")
    checked: dict[str, Any] = facts
    return checked


register_format("pyfast.nn.nf4.NF4Linear", lambda module: module.nf4_weight())  # type: ignore[operator]
