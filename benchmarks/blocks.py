# SPDX-License-Identifier: Apache-2.0
"""The linears of a Llama layer, under its names and in its order: what the block cases run."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn


class _Mlp(nn.Module):
    """SwiGLU."""

    act_fn = staticmethod(F.silu)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


_OWNERS = {"layers": nn.ModuleList, "mlp": _Mlp}


class Block(nn.Module):
    """Linears by path, and the forward of a case's op over them.

    Nothing in it knows of adapters: they are put in as into any model of the family that `config` names.
    """

    def __init__(
        self, op: str, linears: Mapping[str, nn.Module], *, four_bit: bool = False
    ) -> None:
        super().__init__()
        self.op = op
        self.config = SimpleNamespace(model_type="llama")
        self.is_loaded_in_4bit = four_bit
        for path, linear in linears.items():
            owner: nn.Module = self
            *owners, name = path.split(".")
            for part in owners:
                if part not in owner._modules:
                    owner.add_module(part, _OWNERS.get(part, nn.Module)())
                owner = owner._modules[part]
            owner.add_module(name, linear)

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs, in the order of `Case.outputs`."""
        x = inputs["x"]
        if self.op == "lora_linear":
            return [self.proj(x)]
        layer = self.layers[0]
        if self.op == "lora_mlp":
            return [layer.mlp(x)]
        at = layer.self_attn
        ys = [at.q_proj(x), at.k_proj(x), at.v_proj(x)]
        if self.op == "lora_qkv":
            return ys
        mlp, normed = layer.mlp, inputs["normed"]
        ys += [at.o_proj(inputs["attended"]), mlp.gate_proj(normed), mlp.up_proj(normed)]
        return [*ys, mlp.down_proj(inputs["hidden"])]
