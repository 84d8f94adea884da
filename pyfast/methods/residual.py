# SPDX-License-Identifier: Apache-2.0
"""Base weights that lost a part to an adapter (PiSSA's), so that only with it they compute what they did.

What was taken out cannot be had back bit for bit without a copy of every weight, so that whatever would
compute without such an adapter is refused before anything changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pyfast.errors import UnsupportedError
from pyfast.methods.base import adapted_modules
from pyfast.nn import AdapterLayer


def refuse_residual(
    model: nn.Module, what: str, serving: Iterable[str] = (), *, merged: bool = False
) -> None:
    """Raise UnsupportedError, for one of pyfast's functions, where the base weights would compute without the
    part that an adapter took out of them.

    Args:
        model: may carry such adapters.
        what: the function's name for the message.
        serving: the adapters that take part afterwards.
        merged: whether those that are merged into their layer do so too.
    """
    serving = set(serving)
    for module in adapted_modules(model).values():
        if not isinstance(module, AdapterLayer) or (name := module.taken_by) is None:
            continue
        if name not in serving and not (merged and name in module.merged):
            raise UnsupportedError(
                f"{what}: adapter {name!r} began with PiSSA, which took the principal part out of the base "
                f"weights, so that without {name!r} {type(model).__name__} is not the base model any more. "
                "Nothing was changed. Fix: load the base model anew, or put the adapter into the weights for "
                f"good with pyfast.merge(model, {name!r}) and then pyfast.unload(model)"
            )
