# SPDX-License-Identifier: Apache-2.0
"""Each family's table against the real transformers model of its architecture and PEFT's defaults."""

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from pyfast.families import FAMILIES, family_of
from pyfast.methods.targets import linear_modules, match_targets
from tests.models import gpt2, llama

MODELS = {"llama": llama, "gpt2": gpt2}
CASES = [(family, kind) for family in FAMILIES for kind in family.model_types]


@pytest.mark.parametrize(("family", "kind"), CASES, ids=[kind for _, kind in CASES])
def test_table_describes_every_linear_of_every_layer(family, kind):
    model = MODELS[kind](layers=3)
    layers = model.get_submodule(family.layers)
    assert len(layers) == 3
    paths = {f"{family.layers}.{i}.{role}" for i in range(3) for role in family.roles}
    assert paths == {path for path in linear_modules(model) if path.startswith(family.layers)}


@pytest.mark.parametrize(("family", "kind"), CASES, ids=[kind for _, kind in CASES])
def test_default_targets_are_those_of_peft(family, kind):
    assert list(family.lora_targets) == PEFT_TARGETS[kind]
    assert match_targets(MODELS[kind](), None)


def test_family_of():
    assert family_of("llama").name.startswith("Llama")
    assert family_of("no-such-model") is None
    assert family_of(None) is None


def test_every_family_is_reached_by_its_types_only_once():
    kinds = [kind for _, kind in CASES]
    assert len(kinds) == len(set(kinds))
