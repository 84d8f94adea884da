# SPDX-License-Identifier: Apache-2.0
"""The shape of a family's table, and a transformer layer seen through it.

A table says what methods need to find their places, as paths inside one layer:

- `roles`: every linear's role. K and V are those of self- and cross-attention alike; a fused linear has a
  role of its own (QKV, GATE_UP), and `fused` tells which of its rows are which.
- `experts`: the same for 3-D parameters [experts, out, in] of a mixture's experts, which are no modules.
- `mixers` and `mlps`: the modules after whose output a bottleneck adapter goes, before any norm of the output
  and before the residual is added.

`pyfast.families.layers_of(model)` walks a model's layers. A layer need not have all that its family's table
names: an encoder's has no cross-attention, and a recurrent one no keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class Role(Enum):
    """What a linear module does inside a transformer layer."""

    Q = "query"
    K = "key"
    V = "value"
    QKV = "fused query, key and value"
    ATTENTION_OUT = "attention output"
    RECURRENT_IN = "input of the recurrence"
    RECURRENT_GATE = "gate beside the recurrence"
    RECURRENT_OUT = "output of the recurrent block"
    GATE = "gate (the MLP projection that goes through the activation)"
    UP = "up (first MLP projection, or the one that the gate multiplies)"
    GATE_UP = "fused gate and up"
    DOWN = "down (last MLP projection, whose input are the MLP's inner activations)"


_SHARING = (
    (Role.Q, Role.K, Role.V),
    (Role.GATE, Role.UP),
    (Role.RECURRENT_IN, Role.RECURRENT_GATE),
)


@dataclass(frozen=True)
class FusedLayout:
    """Which rows of a fused linear's weight [N, K], and so which of its N outputs, belong to which part.

    The rows are `groups` runs of one length; each holds the parts one after the other. Rows are those of the
    matrix that `pyfast.nn.weight_of` shows, for GPT-2's `Conv1D` the columns of what it stores.

    Attributes:
        parts: role of each part to its rows in one run, in order.
        groups: how many runs there are.
    """

    parts: Mapping[Role, int]
    groups: int = 1

    @property
    def out_features(self) -> int:
        """N."""
        return self.groups * sum(self.parts.values())

    def rows(self, role: Role) -> Tensor:
        """Indices (int64) of a part's rows, in the order that an unfused linear of it would have.

        Raises:
            KeyError: there is no such part.
        """
        size, start = self.parts[role], 0
        for part, before in self.parts.items():
            if part is role:
                break
            start += before
        runs = torch.arange(self.out_features).view(self.groups, -1)
        return runs[:, start : start + size].reshape(-1)


@dataclass(frozen=True)
class Family:
    """One model family. Paths are those inside a layer, but for `layers` and `uncalled`.

    Attributes:
        name: as `pyfast info` prints it.
        model_types: transformers' `config.model_type` values.
        layers: path of each list of layers, from the root of the model that has the head.
        roles: path of every linear module to its role.
        lora_targets: what `target_modules=None` means: PEFT's default where it has one that works, else
            q and v.
        mixers: modules that mix positions (self-attention, cross-attention, recurrent block); each returns
            a tensor, or a tuple whose first element is its output.
        mlps: MLPs, dense or of experts; each returns a tensor.
        cross_attention: those of the mixers whose keys and values are made of the encoder's output.
        experts: path of each 3-D parameter [experts, out, in] to its role.
        fused: role of each fused linear to the function that makes its layout of a transformers config.
        uncalled: paths, from the root, of embeddings that hold a weight for others and are never called.
        own_loss: whether the model's loss is the mean over its own batch, although its forward takes the
            number of items that Trainer passes where it accumulates gradients.
    """

    name: str
    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    roles: Mapping[str, Role]
    lora_targets: tuple[str, ...]
    mixers: tuple[str, ...] = ("self_attn",)
    mlps: tuple[str, ...] = ("mlp",)
    cross_attention: tuple[str, ...] = ()
    experts: Mapping[str, Role] = field(default_factory=dict)
    fused: Mapping[Role, Callable[[Any], FusedLayout]] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    own_loss: bool = False

    def shared_inputs(self) -> list[list[str]]:
        """Paths inside a layer of modules that read one input: those of one parent with such roles."""
        found: dict[tuple[str, int], list[str]] = {}
        for path, role in self.roles.items():
            parent = path.rpartition(".")[0]
            if role is Role.Q and parent in self.cross_attention:
                continue  # the keys and values beside it are made of something else
            for index, roles in enumerate(_SHARING):
                if role in roles:
                    found.setdefault((parent, index), []).append(path)
        return [paths for paths in found.values() if len(paths) > 1]


@dataclass(frozen=True)
class Layer:
    """One transformer layer of a model.

    Attributes:
        path: from the root of the model that was walked.
        module: the layer.
        family: its table.
        config: the transformers config of the part of the model it lies in.
    """

    path: str
    module: nn.Module
    family: Family
    config: Any

    def roles(self) -> dict[str, Role]:
        """Path inside the layer to role of the linears that this layer has, adapted ones too."""
        there = self._paths()
        return {path: role for path, role in self.family.roles.items() if path in there}

    def mixers(self) -> list[str]:
        """Those of the family's mixers that this layer has."""
        there = self._paths()
        return [path for path in self.family.mixers if path in there]

    def mlps(self) -> list[str]:
        """Those of the family's MLPs that this layer has."""
        there = self._paths()
        return [path for path in self.family.mlps if path in there]

    def layout(self, role: Role) -> FusedLayout:
        """Layout of the layer's fused linear of this role.

        Raises:
            KeyError: the family has no such fused linear.
        """
        return self.family.fused[role](self.config)

    def _paths(self) -> set[str]:
        return {path for path, _ in self.module.named_modules(remove_duplicate=False)}
