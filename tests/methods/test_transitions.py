# SPDX-License-Identifier: Apache-2.0
"""Adapter life: merge, unmerge, disable, switch, delete, unload, in every order that is allowed."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterStateError
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear
from tests.models import fingerprint, gpt2, llama, logits, randomise, twin

MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2}


def adapted(make=llama, **options):
    config = LoraConfig(**{"target_modules": "all-linear", **options})
    return randomise(pyfast.apply(make(), config))


def wanted(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def base_state(model):
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }


@pytest.mark.parametrize("kind", MODELS)
def test_merged_equals_unmerged_and_comes_back_bit_for_bit(kind):
    model = adapted(MODELS[kind])
    expected, state = logits(model), base_state(model)
    for _ in range(20):
        pyfast.merge(model)
        pyfast.unmerge(model)
    pyfast.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    pyfast.unmerge(model)
    assert torch.equal(logits(model), expected)
    after = base_state(model)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_merge_rounds_once(dtype):
    model = adapted(lambda: llama().to(dtype))
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.weight.double() + layer.delta("default").double()
    pyfast.merge(model)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, exact.float().to(dtype))


def test_merging_a_tied_head_leaves_the_embedding():
    model = adapted(lambda: llama(tied=True), target_modules=["lm_head", "q_proj"])
    expected, embedding = logits(model), model.model.embed_tokens.weight.clone()
    pyfast.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    pyfast.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_and_the_state_returns(merged):
    model = llama()
    base = logits(model)
    pyfast.apply(model, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    randomise(model)
    if merged:
        pyfast.merge(model)
    expected, before = logits(model), wanted(model)
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)
        with pyfast.adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert wanted(model) == before
    with pytest.raises(ZeroDivisionError), pyfast.adapters_disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), expected)
    assert bool(model.model.layers[0].mlp.up_proj.merged) is merged


def test_disabled_while_merged_over_nf4():
    model = pyfast.quantize(llama())
    base = logits(model)
    pyfast.apply(model, LoraConfig(target_modules="all-linear"))
    pyfast.merge(randomise(model), dtype=torch.float32)
    expected = logits(model)
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_nf4_merges_into_a_dense_layer(dtype):
    model = randomise(
        pyfast.apply(pyfast.quantize(llama()), LoraConfig(target_modules="all-linear"))
    )
    expected = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    dense = layer.base_weight.dense() + layer.delta("default")
    pyfast.merge(model, dtype=dtype)
    assert type(layer.base_layer) is nn.Linear
    assert torch.equal(layer.weight, dense)
    pyfast.unmerge(model)
    assert isinstance(layer.base_layer, NF4Linear)
    assert torch.equal(logits(model), expected)
    pyfast.unload(pyfast.merge(model))
    assert not any(isinstance(m, (LoraLinear, NF4Linear)) for m in model.modules())
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_unload():
    model = llama()
    classes, base = [type(m) for m in model.modules()], logits(model)
    pyfast.apply(model, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    randomise(model)
    merged = pyfast.unload(pyfast.merge(twin(model)))
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert [type(m) for m in merged.modules()][1:] == classes[1:]
    plain = pyfast.apply(llama(), LoraConfig())
    pyfast.unload(randomise(plain))
    assert torch.equal(logits(plain), base)
    pyfast.apply(plain, LoraConfig())


TWO = {
    "disjoint": (["q_proj"], ["v_proj"]),
    "overlapping": (["q_proj", "v_proj"], ["v_proj", "up_proj"]),
    "same": (["q_proj"], ["q_proj"]),
}


@pytest.mark.parametrize("targets", TWO.values(), ids=TWO.keys())
def test_several_adapters(targets):
    model, singles = llama(), []
    for index, (name, modules) in enumerate(zip("ab", targets, strict=True)):
        config = LoraConfig(target_modules=modules, r=2 + index)
        single = randomise(pyfast.apply(twin(model), config, adapter_name=name), seed=index)
        singles.append((name, config, single))
    base = logits(model)
    for name, config, single in singles:
        pyfast.apply(model, config, adapter_name=name)
        state = {k: v for k, v in single.state_dict().items() if "lora_" in k}
        assert not model.load_state_dict(state, strict=False).unexpected_keys
    for name, _, single in singles:
        pyfast.set_adapter(model, name)
        assert torch.allclose(logits(model), logits(single), atol=1e-6)
        assert wanted(model) == wanted(single)
    pyfast.set_adapter(model, ["a", "b"])
    assert wanted(model) == wanted(singles[0][2]) | wanted(singles[1][2])
    together = logits(model)
    other = twin(model)
    for layer in adapted_layers(other):
        layer.active.reverse()
    assert torch.allclose(logits(other), together, atol=1e-6)
    dense = twin(model)
    with torch.no_grad():
        for layer in adapted_layers(dense):
            for name in layer.active:
                layer.base_layer.weight += layer.delta(name)
    with pyfast.adapters_disabled(dense):
        assert torch.allclose(logits(dense), together, atol=1e-5)
    pyfast.merge(model)
    assert torch.allclose(logits(model), together, atol=1e-5)
    pyfast.unmerge(model)
    pyfast.merge(model, "b")
    assert torch.allclose(logits(model), logits(singles[1][2]), atol=1e-5)
    assert wanted(model) == wanted(singles[1][2])
    pyfast.unmerge(model)
    assert torch.allclose(logits(model), logits(singles[1][2]), atol=1e-6)
    pyfast.delete_adapter(model, "a")
    pyfast.set_adapter(model, "b")
    assert torch.allclose(logits(model), logits(singles[1][2]), atol=1e-6)
    pyfast.delete_adapter(model, "b")
    assert not adapted_layers(model)
    assert torch.equal(logits(model), base)


def adapted_layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLinear)]


def test_gradients_wanted_after_every_transition():
    model = llama()
    pyfast.apply(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    first = wanted(model)
    assert first
    assert all(".default." in name for name in first)
    pyfast.apply(model, LoraConfig(target_modules=["q_proj", "v_proj"]), adapter_name="b")
    second = wanted(model)
    assert all(".b." in name for name in second)
    pyfast.set_adapter(model, "default")
    assert wanted(model) == first
    pyfast.set_adapter(model, [])
    assert wanted(model) == set()
    pyfast.set_adapter(model, ["default", "b"])
    assert wanted(model) == first | second
    pyfast.merge(model)
    pyfast.unmerge(model)
    assert wanted(model) == first | second
    with pyfast.adapters_disabled(model):
        assert wanted(model) == first | second
    pyfast.delete_adapter(model, "default")
    assert wanted(model) == second
    pyfast.unload(model)
    assert wanted(model) == set()


def test_adapter_names_do_not_interfere():
    model = llama()
    for name in ("a", "aa", "lora_A", "default"):
        pyfast.apply(model, LoraConfig(), adapter_name=name)
    randomise(model)
    keys = {name: set(pyfast.adapter_parameters(model, name)) for name in ("a", "aa", "lora_A")}
    assert keys["a"] == keys["aa"] == keys["lora_A"]
    pyfast.delete_adapter(model, "a")
    with pytest.raises(AdapterStateError):
        pyfast.set_adapter(model, "a")
    pyfast.set_adapter(model, "aa")


class Life(RuleBasedStateMachine):
    """Random transitions against a plain model of what should be active, merged and there."""

    @initialize()
    def start(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.original = [self.model[i].weight.detach().clone() for i in (0, 2)]
        self.adapters, self.active, self.merged, self.count = {}, [], [], 0

    @precondition(lambda self: len(self.adapters) < 4 and not self.merged)
    @rule(names=st.sampled_from([["0"], ["2"], ["0", "2"]]), rank=st.integers(1, 3))
    def add(self, names, rank):
        self.count += 1
        name = f"n{self.count}"
        pyfast.apply(self.model, LoraConfig(target_modules=names, r=rank), adapter_name=name)
        randomise(self.model, std=0.3, seed=self.count)
        self.adapters[name], self.active = names, [name]

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def choose(self, data):
        self.active = data.draw(st.lists(st.sampled_from(sorted(self.adapters)), unique=True))
        pyfast.set_adapter(self.model, self.active)

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        pyfast.delete_adapter(self.model, name)
        del self.adapters[name]
        self.active = [n for n in self.active if n != name]

    @precondition(lambda self: self.active and not self.merged)
    @rule()
    def merge(self):
        pyfast.merge(self.model)
        self.merged = list(self.active)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        pyfast.unmerge(self.model)
        self.merged = []

    @precondition(lambda self: self.merged)
    @rule()
    def refused_while_merged(self):
        for call in (
            lambda: pyfast.set_adapter(self.model, []),
            lambda: pyfast.merge(self.model),
            lambda: pyfast.delete_adapter(self.model, self.merged[0]),
            lambda: pyfast.apply(self.model, LoraConfig(target_modules=["0"]), adapter_name="x"),
        ):
            with pytest.raises(AdapterStateError):
                call()

    @invariant()
    def outputs_are_right(self):
        x = torch.linspace(-1, 1, 18).reshape(3, 6)
        expected = x
        for index, weight in zip((0, 2), self.original, strict=True):
            module = self.model[index]
            total = weight
            if isinstance(module, LoraLinear):
                for name in self.active:
                    if str(index) in self.adapters[name]:
                        total = total + module.delta(name)
            expected = nn.functional.linear(expected, total, module.bias)
            expected = expected.tanh() if index == 0 else expected
        assert torch.allclose(self.model(x), expected, atol=1e-5)
        with pyfast.adapters_disabled(self.model):
            for index, weight in zip((0, 2), self.original, strict=True):
                assert torch.equal(self.model[index].weight, weight)
        expected = {n for n in self.active if self.adapters[n]}
        held = {n.split(".")[2] for n in wanted(self.model) if "lora_" in n}
        assert held == expected


Life.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase


def test_state_changes_are_refused_while_adapters_are_disabled():
    model = pyfast.apply(llama(), pyfast.LoraConfig(target_modules=["q_proj"]))
    pyfast.merge(model)
    before = fingerprint(model)
    calls = [
        lambda: pyfast.merge(model),
        lambda: pyfast.unmerge(model),
        lambda: pyfast.unload(model),
        lambda: pyfast.set_adapter(model, "default"),
        lambda: pyfast.delete_adapter(model, "default"),
        lambda: pyfast.apply(model, pyfast.LoraConfig(target_modules=["q_proj"]), adapter_name="b"),
    ]
    with pyfast.adapters_disabled(model):
        for call in calls:
            with pytest.raises(pyfast.errors.AdapterStateError, match="adapters_disabled"):
                call()
    assert fingerprint(model) == before
    pyfast.unmerge(model)


def test_a_name_given_twice_counts_once():
    model = pyfast.apply(llama(), pyfast.LoraConfig(target_modules=["q_proj"]))
    pyfast.set_adapter(model, ["default", "default"])
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.active == ["default"]
    pyfast.merge(model, ["default", "default"])
    assert layer.merged == ["default"]


@pytest.mark.parametrize("name", ["items", "pop", "forward", "training"])
def test_names_of_module_attributes_are_refused(name):
    model = llama()
    config = pyfast.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(pyfast.errors.AdapterStateError, match="is taken"):
        pyfast.apply(model, config, adapter_name=name)
    assert not any("lora" in key for key in model.state_dict())


def test_merging_takes_floating_point_types_only():
    model = pyfast.apply(llama(), pyfast.LoraConfig(target_modules=["q_proj"]))
    for dtype in (torch.int8, torch.float8_e4m3fn, "float16", 3):
        with pytest.raises(pyfast.errors.ConfigError, match="floating-point"):
            pyfast.merge(model, dtype=dtype)
