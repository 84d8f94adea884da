# SPDX-License-Identifier: Apache-2.0
"""Tables made of the names of linears: against the families' own, and for architectures that have none."""

import pytest
import torch
import transformers
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import TargetModuleError
from pyfast.families import Role, automatic, family_of, layers_of, shared_inputs
from pyfast.methods.targets import linear_modules, match_targets
from tests.family_models import VARIANTS, variant
from tests.models import VOCAB, token_ids

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER_DECODER = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
SPLIT = {
    "self_attn.q_proj": Role.Q,
    "self_attn.k_proj": Role.K,
    "self_attn.v_proj": Role.V,
}
UNKNOWN = {
    "phi": (
        SIZES,
        ("q_proj", "v_proj"),
        {
            **SPLIT,
            "self_attn.dense": Role.ATTENTION_OUT,
            "mlp.fc1": Role.UP,
            "mlp.fc2": Role.DOWN,
        },
    ),
    "opt": (
        {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
        ("q_proj", "v_proj"),
        {
            **SPLIT,
            "self_attn.out_proj": Role.ATTENTION_OUT,
            "fc1": Role.UP,
            "fc2": Role.DOWN,
        },
    ),
    "bloom": (
        {**SIZES, "n_layer": 2, "n_head": 4},
        ("query_key_value",),
        {
            "self_attention.query_key_value": Role.QKV,
            "self_attention.dense": Role.ATTENTION_OUT,
            "mlp.dense_h_to_4h": Role.UP,
            "mlp.dense_4h_to_h": Role.DOWN,
        },
    ),
}
"""model_type: sizes, default targets, roles."""


def unknown(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **UNKNOWN[kind][0])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", UNKNOWN)
def test_roles_of_models_without_a_table(kind):
    model = unknown(kind)
    assert family_of(model.config.model_type) is None
    table, (_, targets, roles) = automatic(model), UNKNOWN[kind]
    assert dict(table.roles) == roles
    assert table.lora_targets == targets
    (mixer,) = table.mixers
    assert [mixer, *table.mlps] == list(
        dict.fromkeys(path[: path.rfind(".")] for path in roles if "." in path)
    )
    layers = list(layers_of(model))
    assert [layer.path for layer in layers] == [f"{table.layers[0]}.{index}" for index in (0, 1)]
    assert all(layer.module is model.get_submodule(layer.path) for layer in layers)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_default_targets_of_models_without_a_table_train(kind):
    model = unknown(kind)
    chosen = match_targets(model, None)
    assert {path.rpartition(".")[2] for path in chosen} == set(UNKNOWN[kind][1])
    pyfast.apply(model, LoraConfig())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_agrees_with_the_tables_of_known_families(name):
    """But for what names do not tell: recurrent blocks, which it refuses, experts and fused layouts."""
    model = variant(name)
    family = family_of(model.config.model_type)
    if Role.RECURRENT_IN in family.roles.values():
        with pytest.raises(TargetModuleError, match="temporal_block"):
            automatic(model)
        return
    table = automatic(model)
    there = {path for layer in layers_of(model) for path in layer.roles()}
    assert dict(table.roles) == {p: role for p, role in family.roles.items() if p in there}
    assert table.layers == family.layers
    assert set(table.lora_targets) == set(family.lora_targets)
    assert table.mixers == family.mixers
    assert set(table.mlps) == (set() if family.experts else set(family.mlps))
    assert table.cross_attention == family.cross_attention


def test_encoder_decoders_of_other_types():
    config = transformers.UMT5Config(vocab_size=VOCAB, **ENCODER_DECODER)
    model = transformers.UMT5ForConditionalGeneration(config)
    known = family_of("t5")
    table = automatic(model)
    assert table.layers == known.layers
    assert set(table.roles.items()) <= set(known.roles.items())
    assert list(shared_inputs(model))[-1].keys() == {"wi_0", "wi_1"}


def test_lists_of_experts():
    def layer():
        names = {"w1": (64, 96), "w2": (96, 64), "w3": (64, 96)}
        experts = [nn.ModuleDict({n: nn.Linear(*s) for n, s in names.items()}) for _ in range(2)]
        attention = {n: nn.Linear(64, 64) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return nn.ModuleDict(
            {
                "attn": nn.ModuleDict(attention),
                "moe": nn.ModuleDict({"experts": nn.ModuleList(experts)}),
            }
        )

    model = nn.ModuleDict({"blocks": nn.ModuleList([layer(), layer()])})
    table = automatic(model)
    assert table.layers == ("blocks",)
    assert table.mlps == ("moe",)
    assert table.roles["moe.experts.1.w3"] is Role.UP
    assert len(table.roles) * 2 == len(linear_modules(model))


def test_a_linear_of_unknown_name_is_named():
    config = transformers.AutoConfig.for_model("mamba", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(TargetModuleError) as caught:
        match_targets(model, None)
    assert str(caught.value) == (
        "[PF001] MambaForCausalLM has no default targets; set target_modules, for example "
        "target_modules='all-linear', or add its family to pyfast.families: the role of "
        "'mixer.in_proj' is not known. Nothing was changed"
    )
    assert list(layers_of(model)) == []
    assert list(shared_inputs(model)) == []
    pyfast.apply(model, LoraConfig(target_modules="all-linear"))
