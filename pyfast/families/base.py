# SPDX-License-Identifier: Apache-2.0
"""The shape of a family's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """What a linear module does inside a transformer layer."""

    Q = "query"
    K = "key"
    V = "value"
    QKV = "fused query, key and value"
    ATTENTION_OUT = "attention output"
    GATE = "gate"
    UP = "up (first MLP projection)"
    DOWN = "down (last MLP projection)"


_SHARING = ((Role.Q, Role.K, Role.V), (Role.GATE, Role.UP))


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as `pyfast info` prints it.
        model_types: transformers' `config.model_type` values.
        layers: path of the list of layers from the model's root.
        roles: module path inside a layer to its role.
        lora_targets: what `target_modules=None` means, PEFT's default for the family.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    roles: Mapping[str, Role]
    lora_targets: tuple[str, ...]

    def shared_inputs(self) -> list[list[str]]:
        """Paths inside a layer of modules that read one input: those of one parent with such roles."""
        found: dict[tuple[str, int], list[str]] = {}
        for path, role in self.roles.items():
            for index, roles in enumerate(_SHARING):
                if role in roles:
                    found.setdefault((path.rpartition(".")[0], index), []).append(path)
        return [paths for paths in found.values() if len(paths) > 1]
