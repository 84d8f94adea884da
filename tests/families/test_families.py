# SPDX-License-Identifier: Apache-2.0
"""Each family's table against the real transformers models of its architecture and PEFT's defaults."""

import peft.utils.constants
import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.families import FAMILIES, Role, family_of, layers_of
from pyfast.methods.targets import linear_modules, match_targets, output_layers
from tests.family_models import VARIANTS, batch, variant
from tests.models import llama

PEFT_TARGETS = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
KINDS = {values["model_type"] for values in VARIANTS.values()}
variants = pytest.mark.parametrize("name", VARIANTS)


@variants
def test_every_linear_of_every_layer_has_a_role(name):
    model = variant(name)
    layers = list(layers_of(model))
    assert layers
    named = {f"{layer.path}.{path}" for layer in layers for path in layer.roles()}
    assert named == set(linear_modules(model)) - output_layers(model)


@variants
def test_layers_are_found_by_their_paths(name):
    model = variant(name)
    family = family_of(model.config.model_type)
    lists = [model.get_submodule(path) for path in family.layers]
    assert [layer.module for layer in layers_of(model)] == [m for each in lists for m in each]
    for layer in layers_of(nn.ModuleDict({"outer": model})):
        assert layer.path.startswith("outer.")
        assert model.get_submodule(layer.path.removeprefix("outer.")) is layer.module


@variants
def test_every_matrix_of_a_layer_is_a_linear_or_of_the_experts(name):
    """All that is left over are norms, biases, routers, and what makes up a recurrence."""
    for layer in layers_of(variant(name)):
        left = [
            path
            for path, parameter in layer.module.named_parameters()
            if parameter.ndim > 1 and path.rpartition(".")[0] not in layer.roles()
        ]
        own = ("mlp.gate.weight", "relative_attention_bias.weight", "conv_1d.weight")
        left = [path for path in left if not path.endswith(own) and ".rg_lru." not in path]
        assert left == list(layer.family.experts)


def test_every_path_of_a_table_exists_in_a_variant():
    for family in FAMILIES:
        found: set[str] = set()
        for name, values in VARIANTS.items():
            if values["model_type"] in family.model_types:
                for layer in layers_of(variant(name)):
                    found |= {*layer.roles(), *layer.mixers(), *layer.mlps()}
        assert found == {*family.roles, *family.mixers, *family.mlps}, family.name
        assert set(family.cross_attention) <= set(family.mixers)


@variants
def test_mixers_and_mlps_hold_the_linears_and_give_the_layers_output(name):
    """Oracle: adding to what each of them returns moves the layer's output (Houlsby's places)."""
    model = variant(name)
    expected = model(**batch(model)).logits
    for layer in layers_of(model):
        blocks = [*layer.mixers(), *layer.mlps()]
        assert len(blocks) == (3 if layer.path.startswith("decoder.block") else 2)
        assert all(path.rpartition(".")[0] in blocks for path in layer.roles())
        for path in blocks:

            def shifted(_module, _inputs, output):
                first = output[0] if isinstance(output, tuple) else output
                assert first.shape[-1] == model.get_input_embeddings().embedding_dim
                first = first + torch.linspace(0, 1, first.shape[-1])
                return (first, *output[1:]) if isinstance(output, tuple) else first

            handle = layer.module.get_submodule(path).register_forward_hook(shifted)
            assert not torch.allclose(model(**batch(model)).logits, expected, atol=1e-3)
            handle.remove()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_default_targets_are_those_of_peft_where_it_has_them(kind):
    family = family_of(kind)
    without = {"nemotron", "glm", "glm4", "starcoder2", "recurrent_gemma", "phi3", "olmo2"}
    assert (kind not in PEFT_TARGETS) == (kind in without)
    if kind not in without:
        assert list(family.lora_targets) == PEFT_TARGETS[kind]


@variants
def test_default_targets_lie_in_every_layer_and_make_q_and_v(name):
    model = variant(name)
    paths = set(match_targets(model, None))
    for layer in layers_of(model):
        roles = {role for path, role in layer.roles().items() if f"{layer.path}.{path}" in paths}
        choices = ({Role.Q, Role.V}, {Role.QKV}, {Role.RECURRENT_IN, Role.RECURRENT_GATE})
        assert roles in choices


@variants
def test_modules_that_share_an_input_do_so(name):
    """Oracle: the tensors that reach them."""
    model = variant(name)
    seen = {}
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, x, path=path: seen.update({path: x}))
    model(**batch(model))
    for layer in layers_of(model):
        for paths in layer.family.shared_inputs():
            inputs = [seen[f"{layer.path}.{path}"][0] for path in paths if path in layer.roles()]
            assert all(x is inputs[0] for x in inputs)


def test_groups_are_formed_in_every_kind_of_layer():
    model = pyfast.apply(variant("t5-gated"), LoraConfig(target_modules="all-linear"))
    cross = model.get_submodule("decoder.block.0.layer.1.EncDecAttention")
    assert set(cross.k.company()) == {"k", "v"}
    assert not cross.q.company()
    assert set(model.encoder.block[0].layer[0].SelfAttention.q.company()) == {"q", "k", "v"}
    assert set(model.decoder.block[1].layer[2].DenseReluDense.wi_0.company()) == {"wi_0", "wi_1"}
    model = pyfast.apply(variant("recurrent_gemma"), LoraConfig(target_modules="all-linear"))
    block = model.model.layers[0].temporal_block
    assert set(block.linear_x.company()) == {"linear_x", "linear_y"}


def test_family_of():
    assert family_of("llama").name.startswith("Llama")
    assert family_of("no-such-model") is None
    assert family_of(None) is None


def test_every_type_has_a_variant_and_one_family():
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))
    assert set(kinds) == KINDS
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_adapted_layers_keep_their_roles():
    model = llama()
    before = [layer.roles() for layer in layers_of(model)]
    pyfast.apply(model, LoraConfig(target_modules="all-linear"))
    assert [layer.roles() for layer in layers_of(model)] == before
