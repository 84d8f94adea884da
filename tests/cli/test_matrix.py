# SPDX-License-Identifier: Apache-2.0
"""The matrix that is printed and published is the one that is tested."""

from __future__ import annotations

from pathlib import Path

import peft.utils.constants
import pytest

import pyfast
from pyfast.cli import matrix
from pyfast.families import FAMILIES, Family, family_of
from pyfast.families.notes import NOTES
from pyfast.methods.base import METHODS
from tests.cli.conftest import Run
from tests.family_models import VARIANTS, variant
from tests.matrix import test_matrix
from tests.matrix.methods import METHODS as TESTED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
PEFT_TARGETS = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def printed(out: str) -> list[tuple[str, str]]:
    """Family and method of every "yes" of a Markdown table."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()
    ]
    return [(row[0], name) for row in rows for name, c in zip(head, row, strict=True) if c == "yes"]


def column_of(tested: str) -> str:
    """A further test of "LoRA" is called "LoRA with experts", say."""
    return tested.partition(" with ")[0]


@pytest.mark.parametrize("flags", [["--matrix"], ["--matrix", "true"]])
def test_what_is_printed_is_what_the_matrix_test_covers(run: Run, flags: list[str]) -> None:
    status, out, _ = run("info", *flags)
    assert status == 0
    shown = printed(out)
    assert len(shown) == len(set(shown))
    names = {id(method): column_of(name) for name, method in TESTED.items()}
    covered = set()
    for cell in test_matrix.cells().args[1]:
        name, method = cell.values
        family = family_of(str(VARIANTS[name]["model_type"]))
        assert family is not None
        covered.add((family.name, names[id(method)]))
    assert set(shown) == covered


def test_every_method_is_a_column_and_has_a_sentence_on_merging() -> None:
    names = {method.name for method in METHODS.values()} | {"QLoRA"}
    assert set(matrix.columns()) == names == set(matrix._MERGING)
    # Oracle: what the matrix test merges.
    merging = {name for name, text in matrix._MERGING.items() if "not at all" not in text}
    assert merging == {column_of(n) for n, method in TESTED.items() if method.merges} | {"SFT"}


def test_new_methods_and_families_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(type(next(iter(METHODS.values())))):  # type: ignore[misc]
        name = "Fresh"

    monkeypatch.setitem(METHODS, Fresh, Fresh())
    assert matrix.columns()[-1] == "Fresh"
    assert (FAMILIES[0].name, "Fresh") in matrix.cells()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == matrix.page(), "run `make docs`"


def test_notes_are_of_families_and_true_of_peft() -> None:
    assert set(NOTES) <= {family.name for family in FAMILIES}
    for family in FAMILIES:
        known = any(kind in PEFT_TARGETS for kind in family.model_types)
        assert any("PEFT has no default" in n for n in NOTES.get(family.name, ())) is not known


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' adapts linear:UserWarning")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_places_of_the_page_are_those_that_get_adapters(family: Family) -> None:
    """Oracle: the names that `apply` gives its parameters, in all variants of the family."""
    lora, ia3, adapters = matrix._section(family).splitlines()[3:6]
    default, _, linears = lora.partition('"all-linear"')
    linears, _, experts = linears.partition('"experts"')
    variants = [name for name, v in VARIANTS.items() if v["model_type"] in family.model_types]
    for config, text in (
        (pyfast.LoraConfig(), default),
        (pyfast.LoraConfig(target_modules="all-linear"), linears),
        (pyfast.IA3Config(), ia3),
        (pyfast.BottleneckConfig(), adapters),
    ):
        places = text.split("`")[1::2]
        keys = [
            key
            for name in variants
            for key in pyfast.adapter_parameters(pyfast.apply(variant(name), config))
        ]
        assert all(any(f".{place}." in key for place in places) for key in keys)
        assert all(any(f".{place}." in key for key in keys) for place in places)
    assert experts.split("`")[1::2] == list(family.experts)
