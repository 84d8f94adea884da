# SPDX-License-Identifier: Apache-2.0
"""What serves an op on a kind of device, in words: for `pyfast info` and the report of `accelerate`."""

from __future__ import annotations

from pyfast import _extension
from pyfast.ops._library import OPS

_PARTS = {
    "absmax": ("NF4 weights", "nf4_dequantize"),
    "dropout": ("dropout", "dropout"),
}
"""Op argument: what it asks for, and the op whose kernels a composition computes that with."""
_KERNELS_OF = dict.fromkeys(
    ("lora_linear_backward", "lora_group", "lora_group_backward"), "lora_linear"
)
"""Op: the one under whose name its kernels are listed, where that is another."""


def serving(op: str, device: str) -> list[str]:
    """The first kernel that can run, then each that cannot and why; or what torch does in their place."""
    if _extension.C is None:
        return ["torch reference (the extension is missing)"]
    if device == "cuda" and (missing := _extension.missing_cuda()):
        return [f"torch reference ({missing})"]
    if device.upper() in OPS[op].devices and _variants(op):
        usable, reasons = _usable(op, device)
        if not usable:
            return [f"torch reference ({'; '.join(reasons) or f'no kernel for {device} is built'})"]
        return [usable, *(f"not {name}: {reason}" for reason, name in reasons.items())]
    arguments = {argument.name for argument in OPS[op].overload._schema.arguments}
    found: list[str] = []
    lacking: dict[str, str] = {}
    for argument, (what, part) in _PARTS.items():
        if argument in arguments and part in OPS:
            usable, reasons = _usable(part, device)
            lacking |= {} if usable else reasons
            found += [f"{usable} for {what}"] if usable else []
    without = f" ({'; '.join(lacking)})" if lacking else ""
    return [f"torch composition{without}{', with ' if found else ''}{' and '.join(found)}"]


def _usable(op: str, device: str) -> tuple[str, dict[str, str]]:
    """The kernel of an op that serves on a kind of device, or "", and the others by their reasons."""
    here = [variant for variant in _variants(op) if variant["device"] == device]
    usable = [variant["name"] for variant in here if not variant["reason"]]
    reasons = {variant["reason"]: variant["name"] for variant in here if variant["reason"]}
    return (usable[0] if usable else ""), reasons


def _variants(op: str) -> list[dict[str, str]]:
    try:
        return list(_extension.C.variants(_KERNELS_OF.get(op, op)))
    except ValueError:  # an op without kernels of its own
        return []
