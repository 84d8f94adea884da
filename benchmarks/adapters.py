# SPDX-License-Identifier: Apache-2.0
"""How each peer puts LoRA into a model that has linears at given paths.

Every function here changes the model in place, gives each linear the factors that it is told, as parameters
of its own, and returns those in the order A, B, A, B, ...
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import pyfast
from benchmarks.cases import SCALE
from benchmarks.prepared import Absent, need

Factors = Mapping[str, tuple[Tensor, Tensor]]


def frozen_linear(w: Tensor) -> nn.Linear:
    """A linear layer over W [N, K] itself."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def _parameter(factor: Tensor) -> nn.Parameter:
    return nn.Parameter(factor.detach().clone())


class PlainLora(nn.Module):
    """The plain PyTorch composition around a linear layer; `drop` is the dropout of the adapter's input."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.a, self.b = base, _parameter(a), _parameter(b)
        self.drop: Callable[[Tensor], Tensor] = functools.partial(F.dropout, p=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * F.linear(F.linear(self.drop(x), self.a), self.b)


def plain(model: nn.Module, factors: Factors, dropout: float = 0.0) -> list[nn.Parameter]:
    """The plain composition."""
    found = []
    for path, (a, b) in factors.items():
        layer = PlainLora(model.get_submodule(path), a, b, dropout)
        model.set_submodule(path, layer)
        found += [layer.a, layer.b]
    return found


def _settings(factors: Factors, dropout: float) -> dict[str, Any]:
    rank = next(iter(factors.values()))[0].shape[0]
    names = sorted({path.rpartition(".")[2] for path in factors})
    alpha = int(SCALE * rank)
    return {"r": rank, "lora_alpha": alpha, "target_modules": names, "lora_dropout": dropout}


def _fill(model: nn.Module, factors: Factors) -> list[nn.Parameter]:
    """Put the factors where both PEFT and pyfast keep them."""
    found = []
    for path, pair in factors.items():
        layer: Any = model.get_submodule(path)
        for held, factor in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            held["default"].weight = _parameter(factor)
            found.append(held["default"].weight)
    return found


def peft(model: nn.Module, factors: Factors, dropout: float = 0.0) -> list[nn.Parameter]:
    """PEFT's layers."""
    need("peft")
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(**_settings(factors, dropout)), model)
    return _fill(model, factors)


def ours(model: nn.Module, factors: Factors, dropout: float = 0.0) -> list[nn.Parameter]:
    """pyfast's layers and groups, as a user gets them."""
    config = pyfast.LoraConfig(**_settings(factors, dropout))
    pyfast.apply(model, config, autocast_adapter_dtype=False)
    return _fill(model, factors)


@functools.cache
def _unsloth_kernels() -> ModuleType | Exception:
    """Unsloth's LoRA kernels, or why they cannot be imported. Its package is left out: importing that changes
    torch, transformers and PEFT for every provider of the process."""
    spec: Any = importlib.util.find_spec("unsloth")
    package = ModuleType("unsloth")
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules.setdefault("unsloth", package)
    os.environ["UNSLOTH_IS_PRESENT"] = "1"  # unsloth_zoo refuses to be imported without
    try:
        return importlib.import_module("unsloth.kernels.fast_lora")
    except Exception as error:  # it raises what it likes where it finds no GPU or other versions
        return error


def unsloth(
    model: nn.Module, factors: Factors, dropout: float = 0.0, *, inplace: bool = False
) -> list[nn.Parameter]:
    """PEFT's layers with Unsloth's kernels in the place of their forwards.

    q, k and v are computed together, and so is an MLP that is called as one; other linears alone. `inplace`
    writes dX over the input, as Unsloth does by itself; inputs that are used again do not survive it.
    """
    need("unsloth")
    kernels = _unsloth_kernels()
    if isinstance(kernels, Exception):
        raise Absent(f"unsloth's kernels cannot be imported: {kernels}")
    parameters = peft(model, factors, dropout)
    for path in factors:
        layer: Any = model.get_submodule(path)
        layer.forward = functools.partial(kernels.apply_lora_o, SimpleNamespace(o_proj=layer))
    for module in list(model.modules()):
        if hasattr(module, "q_proj"):
            _unsloth_qkv(module, functools.partial(kernels.apply_lora_qkv, module, inplace=inplace))
        elif hasattr(module, "gate_proj"):
            mlp = functools.partial(kernels.apply_lora_mlp_swiglu, module, inplace=inplace)
            module.forward = mlp
    return parameters


def _unsloth_qkv(attention: Any, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """Let the first of q, k and v compute all three and the others take theirs."""
    waiting: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        query, *waiting[:] = compute(x)
        return query

    def following(x: Tensor) -> Tensor:
        return waiting.pop(0)

    attention.q_proj.forward = first
    attention.k_proj.forward = attention.v_proj.forward = following
