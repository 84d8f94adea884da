# SPDX-License-Identifier: Apache-2.0
"""Model families as tables: which module plays which role.

Adding a family is one file with one `Family` and its line in `FAMILIES`.
"""

from __future__ import annotations

from pyfast.families.base import Family, Role
from pyfast.families.gpt2 import GPT2
from pyfast.families.llama import LLAMA

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2)


def family_of(model_type: str | None) -> Family | None:
    """The family of a transformers `config.model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


__all__ = ["FAMILIES", "Family", "Role", "family_of"]
