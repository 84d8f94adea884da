# SPDX-License-Identifier: Apache-2.0
"""IA3: places, gradients, several adapters, merging into dense and NF4 weights, refusals."""

import copy

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

import pyfast
from pyfast import IA3Config, LoraConfig
from pyfast.errors import (
    ConfigError,
    QuantizedMergeError,
    TargetModuleError,
    UnsupportedError,
)
from pyfast.families import Role, layers_of
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear
from pyfast.nn.ia3 import IA3Linear
from tests.family_models import VARIANTS, batch, outputs, variant
from tests.models import fingerprint, gpt2, llama, logits, plain, train, twin

DENSE = [name for name in VARIANTS if name != "mixtral"]
ALL = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def scatter(model, *, std=0.3, seed=1):
    """Give every IA3 vector values around one; the same for ours and PEFT's, by name."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters(), key=lambda item: plain(item[0])):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(1 + noise)
    return model


@pytest.mark.parametrize("name", DENSE)
def test_default_places_are_keys_values_and_mlps_alone(name):
    """Scaling by hand in hooks: the paper's formula on every family's own modules."""
    model = variant(name).double()
    inputs = batch(model)
    expected = twin(model)
    pyfast.apply(model, IA3Config())
    assert torch.equal(outputs(model), outputs(expected))
    scatter(model)
    vectors = {
        path: module.vector("default").detach().double().requires_grad_()
        for path, module in model.named_modules()
        if isinstance(module, IA3Linear)
    }
    for layer in layers_of(expected):
        for path, role in layer.roles().items():
            module, key = layer.module.get_submodule(path), f"{layer.path}.{path}"
            if role is Role.DOWN:
                scale = vectors.pop(key)
                module.register_forward_pre_hook(lambda _, args, s=scale: (args[0] * s,))
            elif role in (Role.K, Role.V, Role.QKV):
                scale = vectors.pop(key)
                if role is Role.QKV:
                    assert (scale[layer.layout(role).rows(Role.Q)] == 1).all()
                module.register_forward_hook(lambda _, __, out, s=scale: out * s)
    assert not vectors
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "gpt2", "falcon-40b", "gpt_bigcode"])
def test_pefts_config_means_what_it_means_to_peft(name):
    base = variant(name)
    theirs = scatter(get_peft_model(twin(base), peft.IA3Config(fan_in_fan_out=name == "gpt2")))
    ours = scatter(pyfast.apply(base, peft.IA3Config()))
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    other = {plain(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == other.keys()
    inputs = batch(ours)
    for model in (ours, theirs):
        model(**inputs).loss.backward()
    torch.testing.assert_close(outputs(ours), outputs(theirs))
    for key, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, other[key].grad, msg=key)


def test_pefts_default_where_peft_has_none():
    model = variant("nemotron")
    before = fingerprint(model)
    with pytest.raises(TargetModuleError, match="PEFT has no default target_modules for model ty"):
        pyfast.apply(model, peft.IA3Config())
    assert fingerprint(model) == before
    pyfast.apply(variant("mixtral"), peft.IA3Config())


def test_training_follows_peft():
    ours = pyfast.apply(llama(), IA3Config())
    theirs = get_peft_model(llama(), peft.IA3Config())
    assert train(ours, steps=5, eps=1e-3) == pytest.approx(train(theirs, steps=5, eps=1e-3))
    frozen = dict(llama().named_parameters())
    for name, parameter in ours.named_parameters():
        if ".ia3_l." not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours = scatter(pyfast.apply(llama().to(dtype), IA3Config()))
    theirs = scatter(get_peft_model(llama().to(dtype), peft.IA3Config()))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(ours), logits(theirs))


def test_several_adapters_switched_combined_and_disabled():
    base = logits(llama())
    model = scatter(pyfast.apply(llama(), IA3Config()))
    first = logits(model)
    other = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=[])
    pyfast.apply(model, other, adapter_name="b")
    assert torch.equal(logits(model), base)
    scatter(model, seed=2)
    second = logits(model)
    pyfast.set_adapter(model, ["default", "b"])
    both = logits(model)
    assert not torch.allclose(both, first)
    theirs = get_peft_model(llama(), peft.IA3Config())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".ia3_l." in name:
                layer = model.get_submodule(plain(name).removesuffix(".ia3_l.default"))
                parameter.copy_(layer.ia3_l["default"])
                if "b" in layer.ia3_l and "v_proj" in name:
                    parameter.mul_(layer.ia3_l["b"])
        for index, layer in enumerate(model.model.layers):
            bias = layer.mlp.down_proj.vector("b")
            module = theirs.base_model.model.model.layers[index].mlp.down_proj
            module.register_forward_hook(lambda _, __, out, s=bias: out * s)
    torch.testing.assert_close(both, logits(theirs))
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)
    pyfast.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    pyfast.delete_adapter(model, "default")
    pyfast.set_adapter(model, "b")
    assert torch.equal(logits(model), second)
    pyfast.delete_adapter(model, "b")
    assert not any(isinstance(module, IA3Linear) for module in model.modules())
    assert torch.equal(logits(model), base)


def test_lora_and_ia3_on_one_layer_in_either_order(tmp_path):
    lora = LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False, r=2)
    models = []
    for order in ((lora, "l"), (IA3Config(), "i")), ((IA3Config(), "i"), (lora, "l")):
        model = llama()
        for config, name in order:
            torch.manual_seed(3)
            pyfast.apply(model, config, adapter_name=name)
        pyfast.set_adapter(model, ["l", "i"])
        for module in model.modules():
            if isinstance(module, IA3Linear):
                module.ia3_l["i"].data.copy_(
                    torch.linspace(0.5, 2, module.ia3_l["i"].numel()).view_as(module.ia3_l["i"])
                )
        models.append(model)
    first, second = models
    layer = first.model.layers[0].self_attn.v_proj
    assert isinstance(layer, IA3Linear)
    assert isinstance(layer.base_layer, LoraLinear)
    assert torch.equal(logits(first), logits(second))
    x = torch.randn(3, 64)
    inner = layer.base_layer
    delta = inner.lora_B["l"].weight @ inner.lora_A["l"].weight * inner.scaling["l"]
    expected = (x @ (inner.base_layer.weight + delta).T) * layer.vector("i")
    torch.testing.assert_close(layer(x), expected)
    before = logits(first)
    pyfast.merge(first)
    torch.testing.assert_close(logits(first), before, atol=1e-5, rtol=1e-4)
    with pyfast.adapters_disabled(first):
        assert torch.equal(logits(first), logits(llama()))
    pyfast.unmerge(first)
    assert torch.equal(logits(first), before)
    pyfast.merge(first, "l")
    pyfast.unmerge(first)
    pyfast.set_adapter(first, ["l", "i"])
    for name in ("l", "i"):
        pyfast.save_adapter(first, tmp_path / name, adapter_name=name)
    loaded = llama()
    for name in ("i", "l"):
        pyfast.load_adapter(loaded, tmp_path / name, adapter_name=name)
    pyfast.set_adapter(loaded, ["l", "i"])
    assert torch.equal(logits(loaded), before)
    pyfast.delete_adapter(first, "i")
    assert isinstance(first.model.layers[0].self_attn.v_proj, LoraLinear)
    assert torch.equal(logits(pyfast.unload(second)), logits(llama()))


@pytest.mark.parametrize("name", DENSE)
def test_merge_into_dense_weights(name):
    model = scatter(pyfast.apply(variant(name), IA3Config()))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    expected = outputs(model)
    assert pyfast.merge(model) is model
    torch.testing.assert_close(outputs(model), expected, atol=2e-5, rtol=1e-4)
    with pyfast.adapters_disabled(model):
        torch.testing.assert_close(outputs(model), outputs(variant(name)), atol=0, rtol=0)
    pyfast.unmerge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    plain_model = pyfast.unload(pyfast.merge(model))
    assert not any(isinstance(module, IA3Linear) for module in plain_model.modules())
    torch.testing.assert_close(outputs(plain_model), expected, atol=2e-5, rtol=1e-4)


def test_merge_rounds_once_as_peft_does():
    ours = scatter(pyfast.apply(gpt2().to(torch.bfloat16), peft.IA3Config()))
    theirs = scatter(get_peft_model(gpt2().to(torch.bfloat16), peft.IA3Config(fan_in_fan_out=True)))
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in pyfast.unload(pyfast.merge(ours)).named_parameters():
        assert torch.equal(parameter, merged[name]), name


def test_merge_into_flat_scales_of_nf4_keeps_the_codes():
    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    model = scatter(pyfast.apply(pyfast.quantize(llama(bias=True), nested=False), config))
    layer = model.model.layers[0].self_attn.v_proj
    before, expected = layer.base_layer, logits(model)
    pyfast.merge(model)
    merged = layer.base_layer
    assert isinstance(merged, NF4Linear)
    assert torch.equal(merged.weight, before.weight)
    exact = before.nf4_weight().dense(torch.float64) * layer.vector("default")[:, None]
    torch.testing.assert_close(merged.nf4_weight().dense(torch.float64), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    pyfast.unmerge(model)
    assert layer.base_layer is before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("targets", "options", "reason"),
    [
        (["down_proj"], {"nested": False}, "inputs share a scale"),
        (["k_proj"], {"nested": True}, "in 8 bits themselves"),
        (["k_proj"], {"nested": False, "blocksize": 128}, r"no multiple of it \(64\)"),
    ],
)
def test_merge_into_nf4_is_refused_with_the_reason(targets, options, reason):
    model = pyfast.quantize(llama(), **options)
    feedforward = [name for name in targets if name == "down_proj"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    scatter(pyfast.apply(model, config))
    before, expected = fingerprint(model), logits(model)
    with pytest.raises(QuantizedMergeError, match=reason):
        pyfast.merge(model)
    assert fingerprint(model) == before
    pyfast.merge(model, dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    pyfast.unmerge(model)
    assert fingerprint(model) == before


def test_nf4_base_trains_as_its_dense_values_do():
    model = pyfast.quantize(llama())
    reference = llama()
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            reference.get_submodule(path).weight.data = module.nf4_weight().dense()
    theirs = get_peft_model(reference, peft.IA3Config())
    ours = pyfast.apply(model, IA3Config())
    assert train(ours, eps=1e-3) == pytest.approx(train(theirs, eps=1e-3), abs=1e-4)


def test_compiled_model_and_copies():
    model = scatter(pyfast.apply(gpt2(), IA3Config()))
    expected = logits(model)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True)), expected)
    scatter(model, seed=5)
    assert torch.equal(logits(copied), expected)


def test_modules_to_save_and_exclude():
    config = IA3Config(exclude_modules=["v_proj"], modules_to_save=["lm_head"])
    model = pyfast.apply(llama(), config)
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if ".ia3_l." in n}
    assert trained == {"k_proj", "down_proj"}
    assert model.lm_head.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize(
    ("make", "config", "error", "text"),
    [
        (llama, IA3Config(target_modules=["nope"]), TargetModuleError, "matches no module"),
        (
            llama,
            IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"]),
            TargetModuleError,
            "matches none of the 2 target modules",
        ),
        (llama, IA3Config(fused_rows="q"), ConfigError, "must be 'kv' or 'all'"),
        (llama, IA3Config(init_ia3_weights="x"), ConfigError, "must be True or False"),
        (llama, IA3Config(feedforward_modules=3), ConfigError, "list of names"),
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)),
            IA3Config(target_modules=["0"]),
            TargetModuleError,
            "no default feedforward_modules",
        ),
    ],
)
def test_refusals_change_nothing(make, config, error, text):
    model = make()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        pyfast.apply(model, config)
    assert fingerprint(model) == before


def test_fused_layout_that_is_not_known(monkeypatch):
    model = gpt2()
    monkeypatch.setattr(type(next(layers_of(model))), "layout", lambda *_: {}[0])
    with pytest.raises(UnsupportedError, match="fused_rows='all'"):
        pyfast.apply(model, IA3Config())
    pyfast.apply(model, IA3Config(fused_rows="all"))


def test_experts_of_a_layer_share_one_vector(tmp_path):
    """W_down (l * h) is (W_down with scaled columns) h, for every expert."""
    model = scatter(pyfast.apply(variant("mixtral"), IA3Config()))
    reference = scatter(get_peft_model(variant("mixtral"), peft.IA3Config()))
    base = reference.base_model.model
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if ".ia3_l." in name:
                parameter.copy_(model.get_parameter(plain(name)))
        vectors = {}
        for index, layer in enumerate(base.model.layers):
            experts = layer.mlp.experts
            key = f"model.layers.{index}.mlp.experts.down_proj.ia3_l"
            vectors[key] = pyfast.adapter_parameters(model)[key]
            assert vectors[key].shape == (1, 96)
            experts.down_proj.mul_(vectors[key])
    expected = outputs(model)
    torch.testing.assert_close(expected, outputs(reference), atol=1e-5, rtol=1e-4)
    model(**batch(model)).loss.backward()
    assert all(vector.grad.abs().sum() > 0 for vector in vectors.values())
    said = r"has 2 vectors of experts \(first: 'model.layers.0.mlp.experts.down_proj.ia3_l'\), which PEFT"
    with pytest.warns(UserWarning, match=said):
        pyfast.save_adapter(model, tmp_path)
    loaded = pyfast.load_adapter(variant("mixtral"), tmp_path)
    assert torch.equal(outputs(loaded), expected)
    theirs = PeftModel.from_pretrained(variant("mixtral"), tmp_path)  # and PEFT says nothing
    assert not torch.allclose(outputs(theirs), expected, atol=1e-3)
    copied = copy.deepcopy(model)
    pyfast.merge(model)
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-4)
    with pyfast.adapters_disabled(model):
        assert torch.equal(outputs(model), outputs(variant("mixtral")))
    pyfast.unmerge(model)
    assert torch.equal(outputs(model), expected)
    pyfast.delete_adapter(model, "default")
    assert torch.equal(outputs(model), outputs(variant("mixtral")))
    assert torch.equal(outputs(copied), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_by_name():
    model = pyfast.apply(variant("mixtral"), IA3Config(target_modules=["v_proj", "down_proj"]))
    assert len(pyfast.adapter_parameters(model)) == 4
    with pytest.raises(TargetModuleError, match="'up_proj' matches no module"):
        pyfast.apply(variant("mixtral"), IA3Config(target_modules=["v_proj", "up_proj"]))


def test_experts_in_nf4():
    model = scatter(pyfast.apply(pyfast.quantize(variant("mixtral")), IA3Config()))
    model(**batch(model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = fingerprint(model)
    with pytest.raises(QuantizedMergeError):
        pyfast.merge(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_apply_that_runs_out_of_memory(name, call, monkeypatch):
    model = variant(name)
    before, original, calls = fingerprint(model), torch.nn.Parameter.__new__, []

    def failing(cls, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError
        return original(cls, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "__new__", failing)
        with pytest.raises(torch.OutOfMemoryError):
            pyfast.apply(model, IA3Config())
    assert fingerprint(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    assert len(pyfast.adapter_parameters(pyfast.apply(model, IA3Config()))) == 6
