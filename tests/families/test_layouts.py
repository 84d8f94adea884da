# SPDX-License-Identifier: Apache-2.0
"""Layouts of fused linears against what the models' own forwards make of the fused output."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from pyfast.families import FusedLayout, Role, family_of, layers_of
from pyfast.nn import weight_of
from tests.family_models import VARIANTS, variant
from tests.models import token_ids


def with_fused(role, experts=False):
    """Variants whose tables have a fused linear of this role."""
    families = {name: family_of(values["model_type"]) for name, values in VARIANTS.items()}
    return pytest.mark.parametrize(
        "name", [n for n, f in families.items() if role in f.fused and bool(f.experts) == experts]
    )


def fused_outputs(model, role):
    """Layer and output of its fused linear, which appears as the model runs."""
    found = []
    for layer in layers_of(model):
        (path,) = [path for path, known in layer.roles().items() if known is role]
        module = layer.module.get_submodule(path)
        assert weight_of(module).out_features == layer.layout(role).out_features
        module.register_forward_hook(lambda _, x, y, layer=layer: found.append((layer, y)))
    return found


@with_fused(Role.QKV)
def test_qkv_rows_are_what_attention_takes(name, monkeypatch):
    """Oracle: attention's arguments at position 0, where the rotary embedding is the identity."""
    model = variant(name).double()
    taken = []
    attention = functional.scaled_dot_product_attention

    def recording(query, key, value, *args, **kwargs):
        taken.append({Role.Q: query, Role.K: key, Role.V: value})
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recording)
    fused = fused_outputs(model, Role.QKV)
    model(input_ids=token_ids(1, 1))
    assert len(fused) == len(taken) == model.config.num_hidden_layers
    for (layer, y), arguments in zip(fused, taken, strict=True):
        layout = layer.layout(Role.QKV)
        rows = torch.cat([layout.rows(role) for role in arguments])
        assert sorted(rows.tolist()) == list(range(layout.out_features))
        for role, argument in arguments.items():
            part = y.flatten()[layout.rows(role)]
            heads = argument.flatten(0, 2)
            repeats = (
                heads.numel() // part.numel()
            )  # keys and values of one head for several queries
            torch.testing.assert_close(heads[::repeats].flatten(), part, rtol=0, atol=1e-12)
            assert torch.equal(heads, heads[::repeats].repeat_interleave(repeats, 0))


@with_fused(Role.GATE_UP)
def test_gate_and_up_rows_make_the_input_of_down(name):
    model = variant(name).double()
    seen = []
    for layer in layers_of(model):
        (path,) = [path for path, role in layer.roles().items() if role is Role.DOWN]
        layer.module.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    fused = fused_outputs(model, Role.GATE_UP)
    model(input_ids=token_ids())
    assert len(fused) == len(seen) == model.config.num_hidden_layers
    for (layer, y), x in zip(fused, seen, strict=True):
        layout = layer.layout(Role.GATE_UP)
        gate, up = y[..., layout.rows(Role.GATE)], y[..., layout.rows(Role.UP)]
        torch.testing.assert_close(functional.silu(gate) * up, x)


@with_fused(Role.GATE_UP, experts=True)
def test_gate_and_up_rows_of_experts_are_w1_and_w3_of_the_checkpoint(name, tmp_path):
    """Oracle: the names in published checkpoints, which transformers writes."""
    model = variant(name)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    for index, layer in enumerate(layers_of(model)):
        by_role = {role: layer.module.get_parameter(p) for p, role in layer.family.experts.items()}
        layout = layer.layout(Role.GATE_UP)
        for expert in range(model.config.num_local_experts):
            start = f"model.layers.{index}.block_sparse_moe.experts.{expert}"
            fused = by_role[Role.GATE_UP][expert]
            assert torch.equal(file[f"{start}.w1.weight"], fused[layout.rows(Role.GATE)])
            assert torch.equal(file[f"{start}.w3.weight"], fused[layout.rows(Role.UP)])
            assert torch.equal(file[f"{start}.w2.weight"], by_role[Role.DOWN][expert])


def test_rows_by_hand():
    """Two groups of two queries, one key and one value, two rows a head."""
    layout = FusedLayout({Role.Q: 4, Role.K: 2, Role.V: 2}, groups=2)
    assert layout.out_features == 16
    assert layout.rows(Role.Q).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert layout.rows(Role.K).tolist() == [4, 5, 12, 13]
    assert layout.rows(Role.V).tolist() == [6, 7, 14, 15]
    with pytest.raises(KeyError):
        layout.rows(Role.GATE)
