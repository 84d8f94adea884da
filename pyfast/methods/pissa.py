# SPDX-License-Identifier: Apache-2.0
"""PiSSA: LoRA that starts as the principal part of each weight (Meng et al., 2024), as PEFT has it.

Of W = U S V^T the first R singular values make B = U_R sqrt(S_R / s) and A = sqrt(S_R / s) V_R^T, and the
base keeps the residual W - s B A, so that training begins with W and moves what matters most in it. Files
hold A and B alone: loading one makes the same residual of the same base again, which costs the decomposition.
Without the adapter the base would be the residual, no model that anybody trained: what would compute so is
refused, see `methods.residual`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, UnsupportedError
from pyfast.methods.base import refuse_meta
from pyfast.methods.lora_places import Places
from pyfast.nn import AdapterLayer, DenseWeight, weight_of

_FORM = re.compile(r"pissa(?:_niter_(\d+))?")
_MAX_ITERATIONS = 256
_SEED = 0


def is_pissa(init: object) -> bool:
    """Whether `init_lora_weights` means PiSSA: "pissa", or "pissa_niter_<n>" for n subspace iterations in the
    place of the whole decomposition.

    Raises:
        ConfigError: there are too many iterations.
    """
    form = _FORM.fullmatch(init) if isinstance(init, str) else None
    if form and form[1] and (len(form[1]) > 4 or int(form[1]) > _MAX_ITERATIONS):
        raise ConfigError(
            f"LoraConfig: init_lora_weights={str(init)[:40]!r} asks for more than {_MAX_ITERATIONS} "
            "iterations; use 'pissa' for the whole decomposition"
        )
    return form is not None


class PrincipalParts:
    """The base weights of linear layers, out of which an adapter's initial product is taken; none where a
    `LoraConfig` does not ask for PiSSA.

    Args:
        model: holds the layers.
        config: the `LoraConfig`.
        places: where its adapter goes.
        ranks: R by path.
        scales: s by path.

    Raises:
        UnsupportedError: a weight is in NF4, an embedding's, shared with another module, or made anew before
            each forward.
        AdapterStateError: a layer carries other adapters.
        ConfigError: a rank is larger than the weight, or s is negative.
        NonFiniteError: a weight holds NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        places: Places,
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
    ) -> None:
        init = config.init_lora_weights
        self._linears = places.linears if is_pissa(init) else {}
        self._init, self._scales = init, scales
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        if is_pissa(init) and places.embeddings:
            raise UnsupportedError(
                f"init_lora_weights={init!r} does not serve embeddings (nor does PEFT's), and "
                f"{next(iter(places.embeddings))!r} is one; leave it out. Nothing was changed"
            )
        owners: dict[nn.Parameter, int] = {}
        for module in model.modules() if self._linears else ():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners[parameter] = owners.get(parameter, 0) + 1
        for path, base in self._linears.items():
            weight = weight_of(base)
            _check(init, path, base, owners)
            outer = model.get_submodule(path)
            if isinstance(outer, AdapterLayer):
                raise AdapterStateError(
                    f"init_lora_weights={init!r} would change the weight of {path!r}, for which its adapters "
                    f"{outer.links()[-1].adapter_names()} were made; delete them first, or use "
                    "init_lora_weights=True. Nothing was changed"
                )
            smaller = min(weight.out_features, weight.in_features)  # type: ignore[union-attr]
            if ranks[path] > smaller or scales[path] < 0:
                raise ConfigError(
                    f"init_lora_weights={init!r}: {path!r} has {smaller} singular values, but rank "
                    f"{ranks[path]} with scale {scales[path]:g} was asked for; the rank must not be larger "
                    "and lora_alpha positive. Nothing was changed"
                )

    def take_out(self, model: nn.Module, adapter_name: str) -> None:
        """Give the adapter, which is in the layers already, its initial values, and the bases the residuals.
        Until this object is gone it holds the weights as they were."""
        with torch.no_grad():
            for path, base in self._linears.items():
                layer = model.get_submodule(path)
                a: Tensor = layer.lora_A[adapter_name].weight  # type: ignore[index, union-attr]
                b: Tensor = layer.lora_B[adapter_name].weight  # type: ignore[index, union-attr]
                layer.taken_by = adapter_name  # type: ignore[assignment]
                self._take_out(base, a, b, self._scales[path])

    def _take_out(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        parameter: nn.Parameter = base.weight  # type: ignore[assignment]
        matrix: Tensor = weight_of(base).tensor  # type: ignore[union-attr]
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        u, s, vh = _decomposed(wide, self._init, a.shape[0])
        root = torch.sqrt(s / scale)
        a.copy_(root[:, None] * vh)
        b.copy_(u * root)
        # Of the factors as they are stored, so that their rounding is in the residual.
        residual = (wide - (scale * b.to(wide.dtype)) @ a.to(wide.dtype)).to(matrix.dtype)
        self._before.append((parameter, parameter.data))
        stored = residual if matrix is parameter else residual.t()
        parameter.data = stored.contiguous()

    def undo(self) -> None:
        """Put the weights back."""
        for parameter, before in self._before:
            parameter.data = before
        self._before.clear()


def _check(init: str, path: str, base: nn.Module, owners: Mapping[nn.Parameter, int]) -> None:
    """Refuse a weight that cannot become a residual."""
    name, weight = f"{path}.weight", weight_of(base)
    parameter = base._parameters.get("weight")
    reason = ""
    if not isinstance(weight, DenseWeight):
        reason = "is in NF4, whose rounding would undo the residual; apply it to the dense model"
    elif parameter is None:
        reason = "is made anew before each forward (pruning, weight_norm or a parametrization)"
    elif owners[parameter] > 1:
        reason = "is shared with another module, which would lose its principal part"
    if reason:
        raise UnsupportedError(
            f"init_lora_weights={init!r} turns base weights into residuals, but {name!r} {reason}. Fix: "
            "leave it out, or init_lora_weights=True. Nothing was changed"
        )
    refuse_meta(f"init_lora_weights={init!r}", [(name, parameter)])  # type: ignore[list-item]
    if not bool(torch.isfinite(parameter).all()):  # type: ignore[arg-type]
        raise NonFiniteError(f"{name} holds NaN or infinity. Nothing was changed")


def _decomposed(matrix: Tensor, init: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular values and vectors, U [N, R], S [R], V^T [R, K]."""
    form = _FORM.fullmatch(init)
    if form is None or not form[1]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    # Always the same draw: a file is loaded into the residual that it was trained with.
    with torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        u, s, v = torch.svd_lowrank(matrix, rank, niter=int(form[1]))
    return u, s, v.t()
