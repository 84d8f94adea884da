# SPDX-License-Identifier: Apache-2.0
"""The matrix of families and methods as a table, and as the page `docs/matrix.md`.

`python -m pyfast.cli.matrix` prints the page; `make docs` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from pyfast.families import FAMILIES, Family, Role
from pyfast.families.notes import NOTES
from pyfast.methods.base import METHODS
from pyfast.methods.ia3 import PLACES

# Method to what `pyfast.merge` does with it, in the order of the columns.
_MERGING = {
    "SFT": "all weights are trained, so that there is nothing to merge.",
    "LoRA": "into the weights, in float32 or wider and rounded once; with DoRA's norms where there are some.",
    "QLoRA": "NF4 layers become dense ones, of the dtype that they were quantised from or of `dtype`; "
    "`pyfast.requantize` makes them NF4 again where that does not erase the update.",
    "P-tuning": "not at all: virtual tokens are no part of weights.",
    "Adapters": "not at all: they have an activation function inside.",
    "IA3": "into dense weights, and into the biases of scaled outputs. Factors of outputs go into the "
    "scales of NF4 layers, whose codes stay, where the scales are flat and no block crosses a row; other "
    "NF4 layers become dense ones where `dtype` is given.",
}


def columns() -> list[str]:
    """Names of the methods; QLoRA is LoRA on NF4 weights, which the linears of every family can have."""
    names = {method.name for method in METHODS.values()} | {"QLoRA"}
    return [name for name in _MERGING if name in names] + sorted(names - _MERGING.keys())


def cells() -> list[tuple[str, str]]:
    """Every family with every method that serves it, by their names."""
    return [(family.name, column) for family in FAMILIES for column in columns()]


def table() -> str:
    """The matrix as a Markdown table."""
    served, heads = set(cells()), ["family", *columns()]
    rows = [
        [family.name, *("yes" if (family.name, column) in served else "no" for column in heads[1:])]
        for family in FAMILIES
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )


def page() -> str:
    """`docs/matrix.md`."""
    merging = "\n".join(f"- {name}: {_MERGING[name]}" for name in columns() if name in _MERGING)
    return f"""\
# Families and methods

Written by `make docs` from the tables of `pyfast.families` and `pyfast.methods`. `pyfast info --matrix`
prints the first table; `tests/matrix` trains, saves and loads every cell against PEFT or a reference, and
merges those that merge. The same cells in bfloat16 on an H100 are on record, with their losses beside the
reference's and the kernels that served them: `benchmarks/results/h100_matrix.json`.

{table()}

## What merges

{merging}

## Where adapters go

SFT trains all weights. P-tuning has virtual tokens in front of the input. NF4 (QLoRA) takes all linears of
the layers, and the 3-D tensors of experts. Names end a module's path in each layer.

{chr(10).join(map(_section, FAMILIES))}"""


def _section(family: Family) -> str:
    """A family's targets by method, and its notes."""
    fused = [path for path, role in family.roles.items() if role is Role.QKV]
    outputs = [p for p, role in family.roles.items() if role in PLACES and role is not Role.DOWN]
    inputs = [p for p, role in family.roles.items() if role is Role.DOWN]
    inputs += [path for path, role in family.experts.items() if role is Role.DOWN]
    keys = " (keys and values alone)" if fused else ""
    linears = f'"all-linear": {_names(family, family.roles)}'
    if family.experts:
        linears += f'; "experts": {_names(family, family.experts)}'
    lines = [
        f"### {family.name}\n",
        f"- `model_type`: {', '.join(f'`{kind}`' for kind in family.model_types)}",
        f"- LoRA, QLoRA: by default {', '.join(f'`{name}`' for name in family.lora_targets)}; {linears}",
        f"- IA3: outputs of {_names(family, outputs)}{keys}, inputs of {_names(family, inputs)}",
        f"- Adapters: behind {_names(family, [*family.mixers, *family.mlps])}",
        *(f"- {note}" for note in NOTES.get(family.name, ())),
    ]
    return "\n".join(lines) + "\n"


def _names(family: Family, paths: Iterable[str]) -> str:
    """The last parts of paths, or all of those that others of the layer end in too."""
    roles: dict[str, set[Role]] = {}
    for path, role in family.roles.items():
        roles.setdefault(path.rpartition(".")[2], set()).add(role)
    shown = []
    for path in paths:
        last = path.rpartition(".")[2]
        plain = path in family.roles and len(roles[last]) == 1
        shown.append(last if plain else path)
    return ", ".join(f"`{name}`" for name in dict.fromkeys(shown))


if __name__ == "__main__":
    sys.stdout.write(page())
