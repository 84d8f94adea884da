# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters against a reference written here, in float64; placements, files, refusals."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyfast
from pyfast import BottleneckConfig, LoraConfig
from pyfast.errors import (
    AdapterMismatchError,
    ConfigError,
    TargetModuleError,
    UnsupportedError,
)
from pyfast.nn.bottleneck import Bottlenecks
from tests.family_models import VARIANTS, batch, outputs, variant
from tests.models import fingerprint, gpt2, llama, logits, resumed_in_trainer, token_ids, train

MIXERS = ("self_attn", "attn", "self_attention", "attention", "temporal_block")
MIXERS += ("SelfAttention", "EncDecAttention")
MLPS = ("mlp", "mlp_block", "DenseReluDense")
RATES = {
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "relu": lambda h: h.clamp(min=0),
}


def moved(model, *, seed=1):
    """With adapters that training has moved."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(noise.to(parameter.dtype), alpha=0.1)
    return model


def reference(base, weights, activation="silu"):
    """The base with h + act(LayerNorm(h) D^T + d) U^T + u in hooks, of weights by block and letter."""

    def after(block):
        def hook(_, __, output):
            h, w = (output[0] if isinstance(output, tuple) else output), weights[block]
            n = h
            if "norm_weight" in w:
                centred = h - h.mean(-1, keepdim=True)
                n = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                n = n * w["norm_weight"] + w["norm_bias"]
            inner = torch.einsum("...k,rk->...r", n, w["down"]) + w.get("down_bias", 0)
            out = torch.einsum("...r,kr->...k", RATES[activation](inner), w["up"])
            out = h + out + w.get("up_bias", 0)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    for path in weights:
        base.get_submodule(path).register_forward_hook(after(path))
    return base


def weights_of(model):
    """Block to letter to a copy that gets its own gradient."""
    found = {}
    for key, parameter in pyfast.adapter_parameters(model).items():
        block, letter = key.split(".bottleneck.")
        found.setdefault(block, {})[letter] = parameter.detach().clone().requires_grad_()
    return found


def blocks_of(model, names):
    """Paths of blocks with these last names."""
    return {p for p, _ in model.named_modules() if p.rpartition(".")[2] in names}


@pytest.mark.parametrize("name", VARIANTS)
def test_nemos_form_in_every_family(name):
    base = variant(name)
    model = pyfast.apply(variant(name).double(), BottleneckConfig(bottleneck_size=8))
    torch.testing.assert_close(outputs(model), outputs(base.double()), atol=0, rtol=0)
    weights = weights_of(moved(model))
    assert weights.keys() == blocks_of(base, MIXERS + MLPS)
    letters = {"down": (8, 64), "up": (64, 8), "norm_weight": (64,), "norm_bias": (64,)}
    for held in weights.values():
        assert {letter: tuple(w.shape) for letter, w in held.items()} == letters
    expected = reference(base.double().requires_grad_(False), weights)
    inputs = batch(model)
    mine, other = model(**inputs), expected(**inputs)
    torch.testing.assert_close(mine.logits, other.logits)
    mine.loss.backward()
    other.loss.backward()
    for key, parameter in pyfast.adapter_parameters(model).items():
        block, letter = key.split(".bottleneck.")
        torch.testing.assert_close(parameter.grad, weights[block][letter].grad, msg=key)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(".bottleneck." in name for name in trained)


@pytest.mark.parametrize("activation", RATES)
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forms(activation, layer_norm, bias, tmp_path):
    config = BottleneckConfig(
        bottleneck_size=6,
        placement="pfeiffer",
        activation=activation,
        layer_norm=layer_norm,
        bias=bias,
    )
    model = moved(pyfast.apply(llama().double(), config))
    weights = weights_of(model)
    assert weights.keys() == blocks_of(llama(), MLPS)
    expected = reference(llama().double(), weights, activation)
    torch.testing.assert_close(logits(model), logits(expected))
    pyfast.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for block, held in weights.items():
        for letter, tensor in held.items():
            assert torch.equal(stored.pop(f"base_model.model.{block}.bottleneck.{letter}"), tensor)
    assert not stored
    back = pyfast.load_adapter(llama().double(), tmp_path)
    assert torch.equal(logits(back), logits(model))


def test_initial_values_are_nemos():
    model = pyfast.apply(llama(), BottleneckConfig(bias=True))
    parameters = pyfast.adapter_parameters(model)
    for key, parameter in parameters.items():
        if key.endswith(".down"):
            assert parameter.shape == (32, 64)
            assert parameter.std().item() == pytest.approx((2 / 96) ** 0.5, rel=0.1)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, key.endswith("norm_weight")))


def test_training_follows_the_reference_and_goes_on(tmp_path):
    torch.manual_seed(2)
    model = pyfast.apply(llama(), BottleneckConfig(bottleneck_size=8))
    weights = weights_of(model)
    expected = reference(llama().requires_grad_(False), weights)
    for block, held in weights.items():
        for letter, tensor in held.items():
            held[letter] = nn.Parameter(tensor.detach())
            name = f"{block}.{letter}".replace(".", "_")
            expected.register_parameter(name, held[letter])
    losses = train(model, steps=6, eps=1e-3)
    assert losses == pytest.approx(train(expected, steps=6, eps=1e-3), rel=1e-4)
    assert losses[-1] < losses[0]
    pyfast.save_adapter(model, tmp_path)
    again = pyfast.load_adapter(llama(), tmp_path, trainable=True)
    assert train(again, steps=2) == train(model, steps=2)


def test_half_precision_and_nf4_bases_have_adapters_in_float32():
    for make in (lambda: llama().to(torch.bfloat16), lambda: pyfast.quantize(llama())):
        model = moved(pyfast.apply(make(), BottleneckConfig(bottleneck_size=8)))
        parameters = pyfast.adapter_parameters(model)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        assert all(p.grad is not None for p in parameters.values())
        dtype = make().get_input_embeddings().weight.dtype
        weights = {
            block: {letter: w.to(dtype) for letter, w in held.items()}
            for block, held in weights_of(model).items()
        }
        expected = logits(reference(make(), weights))
        torch.testing.assert_close(
            logits(model), expected, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=1e-3
        )
    kept = pyfast.apply(
        llama().to(torch.bfloat16), BottleneckConfig(), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in pyfast.adapter_parameters(kept).values()} == {torch.bfloat16}


def test_several_beside_lora_switched_disabled_and_taken_off(tmp_path):
    base = logits(gpt2())
    model = moved(pyfast.apply(gpt2(), BottleneckConfig(bottleneck_size=4)))
    first = logits(model)
    other = BottleneckConfig(bottleneck_size=3, placement="pfeiffer", layer_norm=False)
    moved(pyfast.apply(model, other, adapter_name="b"), seed=2)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    pyfast.apply(model, lora, adapter_name="lora")
    alone = logits(model)
    keys = pyfast.adapter_parameters(model, "lora").keys()
    assert keys == pyfast.adapter_parameters(pyfast.apply(gpt2(), lora)).keys()
    pyfast.set_adapter(model, ["default", "lora", "b"])
    together = logits(model)
    block = model.transformer.h[0].mlp.bottleneck
    x = torch.randn(3, 64)
    torch.testing.assert_close(block.adapted(x), block.adapters["b"](block.adapters["default"](x)))
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)
        assert torch.equal(logits(copy.deepcopy(model)), together)
    with pytest.raises(UnsupportedError, match="no linear function"):
        pyfast.merge(model)
    pyfast.merge(model, "lora")
    torch.testing.assert_close(logits(model), alone, atol=1e-4, rtol=1e-4)
    pyfast.unmerge(model)
    pyfast.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    pyfast.delete_adapter(model, "default")
    pyfast.set_adapter(model, ["lora", "b"])
    copied = copy.deepcopy(model)
    for name in ("b", "lora"):
        pyfast.delete_adapter(model, name)
    assert not any(isinstance(module, Bottlenecks) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(logits(model), base)
    assert not torch.equal(logits(copied), base)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_generation_compilation_and_checkpointing(name):
    model = moved(pyfast.apply(variant(name, use_cache=True), BottleneckConfig(bottleneck_size=4)))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 12)}
    cached = model.generate(token_ids(), **options)
    assert torch.equal(model.generate(token_ids(), use_cache=False, **options), cached)
    plain = [p.grad for p in gradients(model)]
    new = getattr(model, "activation_checkpointing_enable", None)  # transformers >= 5.24
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for one, other in zip(plain, (p.grad for p in gradients(model.train())), strict=True):
        torch.testing.assert_close(one, other)
    if name == "llama":
        plain_model = moved(pyfast.apply(llama(), BottleneckConfig(bottleneck_size=4)))
        found = logits(torch.compile(plain_model, fullgraph=True))
        torch.testing.assert_close(found, logits(plain_model))


def gradients(model):
    """The trained parameters after a backward."""
    model.zero_grad()
    model(**batch(model), use_cache=False).loss.backward()
    held = [p for p in model.parameters() if p.requires_grad]
    copies = [nn.Parameter(p.detach()) for p in held]
    for copied, parameter in zip(copies, held, strict=True):
        copied.grad = parameter.grad.clone()
    return copies


def test_places_by_name_and_by_layer():
    config = BottleneckConfig(target_modules=["self_attn"], layers_to_transform=[1])
    model = pyfast.apply(llama(), config)
    assert weights_of(model).keys() == {"model.layers.1.self_attn"}
    config = BottleneckConfig(target_modules=r".*0\.(mlp|self_attn)", modules_to_save=["lm_head"])
    model = pyfast.apply(llama(), config)
    assert {k for k in pyfast.adapter_parameters(model) if "bottleneck" not in k} == {
        "lm_head.weight"
    }
    assert blocks_of(model, ("bottleneck",)) == {
        "model.layers.0.self_attn.bottleneck",
        "model.layers.0.mlp.bottleneck",
    }


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bottleneck_size": 0}, ConfigError, "bottleneck_size=0"),
        ({"bottleneck_size": "8"}, ConfigError, "bottleneck_size='8'"),
        ({"placement": "front"}, ConfigError, "placement='front'"),
        ({"activation": "swish"}, ConfigError, "must be one of"),
        ({"bias": None}, ConfigError, "bias=None"),
        ({"layers_to_transform": 7}, TargetModuleError, "no layer 7"),
        ({"target_modules": ["attention"]}, TargetModuleError, "'attention' matches no module"),
        ({"modules_to_save": ["mlp"]}, UnsupportedError, "is to have a bottleneck adapter"),
    ],
)
def test_refusals_change_nothing(options, error, text):
    model = llama()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        pyfast.apply(model, BottleneckConfig(**options))
    assert fingerprint(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_says_no_hidden_size():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=r"hidden_size, .* and target_modules"):
        pyfast.apply(nn.Linear(4, 4), BottleneckConfig())
    with pytest.raises(UnsupportedError, match="no config with a hidden_size"):
        pyfast.apply(model, BottleneckConfig(target_modules=["0"]))


def test_apply_that_runs_out_of_memory(monkeypatch):
    model = llama()
    before, original, calls = fingerprint(model), nn.init.xavier_normal_, []

    def failing(tensor):
        calls.append(not tensor.is_meta)
        if sum(calls) == 3:
            raise torch.OutOfMemoryError("third adapter")
        return original(tensor)

    monkeypatch.setattr(nn.init, "xavier_normal_", failing)
    with pytest.raises(torch.OutOfMemoryError):
        pyfast.apply(model, BottleneckConfig())
    assert fingerprint(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_file_of_another_form(tmp_path):
    pyfast.save_adapter(pyfast.apply(llama(), BottleneckConfig()), tmp_path)
    settings = tmp_path / "adapter_config.json"
    values = json.loads(settings.read_text())
    assert values["peft_type"] == "BOTTLENECK"
    for change in ({"layer_norm": False}, {"bottleneck_size": 4}):
        settings.write_text(json.dumps(values | change))
        with pytest.raises(AdapterMismatchError):
            pyfast.load_adapter(llama(), tmp_path)
    settings.write_text(json.dumps(values | {"bias": "yes"}))
    with pytest.raises(ConfigError, match="bias='yes'"):
        pyfast.load_adapter(llama(), tmp_path)


def test_trainer_saves_and_resumes(tmp_path):
    whole, resumed, losses = resumed_in_trainer(
        lambda: pyfast.apply(gpt2(), BottleneckConfig(bottleneck_size=4)), tmp_path
    )
    assert losses[0] > losses[3]
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
