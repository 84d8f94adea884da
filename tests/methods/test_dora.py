# SPDX-License-Identifier: Apache-2.0
"""DoRA on real models: same parameters, results and training as PEFT; merging, switching, refusals."""

import accelerate
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, UnsupportedError
from pyfast.methods import lora
from tests.models import (
    fingerprint,
    gpt2,
    llama,
    logits,
    nf4_and_dense,
    plain,
    token_ids,
    train,
    twin,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]

ALL = {"target_modules": "all-linear", "use_dora": True}
CONFIGS = {
    "default": {"use_dora": True},
    "all-linear": ALL,
    "rslora": {**ALL, "use_rslora": True, "r": 4, "lora_alpha": 6},
    "patterns": {
        **ALL,
        "rank_pattern": {"q_proj": 3, r"^model\.layers\.1\.mlp.*": 5, "up_proj": 7},
        "alpha_pattern": {"k_proj": 9, r"layers\.\d+\.self_attn\.q_proj": 2},
    },
    "head": {**ALL, "target_modules": ["lm_head", "q_proj"]},
    "saved": {**ALL, "modules_to_save": ["norm"]},
    "gaussian": {**ALL, "init_lora_weights": "gaussian"},
}


def trained(model, seed=1):
    """Give adapters values as training would: factors of noise, norms near those that they had."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: plain(item[0])):
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                near = parameter * (1 + 0.2 * noise)
                parameter.copy_(near if "lora_magnitude" in name else 0.05 * noise)
    return model


def both(make, options, **extra):
    """Ours and PEFT's with the same settings and the same adapter."""
    model = make()
    theirs = get_peft_model(twin(model), PeftConfig(**options, **extra))
    return trained(pyfast.apply(model, LoraConfig(**options, **extra))), trained(theirs)


def trainable(model):
    return {plain(n): p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_parameters_and_logits_as_peft(name):
    ours, theirs = both(llama, CONFIGS[name])
    mine, others = trainable(ours), trainable(theirs)
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in others.items()}
    assert any("lora_magnitude_vector" in name for name in mine)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)


RUNS = {
    "llama": (llama, {}),
    "tied": (lambda: llama(tied=True), {}),
    "bias": (lambda: llama(bias=True), {}),
    "gpt2": (gpt2, {}),
    "checkpoints": (llama, {"use_reentrant": False}),
    "reentrant": (llama, {"use_reentrant": True}),
}


@pytest.mark.parametrize("case", RUNS)
def test_trains_like_peft(case):
    make, checkpointing = RUNS[case]
    ours, theirs = both(make, {**ALL, "fan_in_fan_out": make is gpt2})
    if checkpointing:
        ours.gradient_checkpointing_enable(checkpointing)
    grads, expected = [], []
    losses = train(ours, grads=grads)
    assert losses == pytest.approx(train(theirs, grads=expected), abs=1e-5)
    assert grads[0].keys() == expected[0].keys()
    for name, grad in expected[0].items():
        assert torch.allclose(grads[0][name], grad, atol=1e-6), name
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_norms_start_as_pefts(init):
    model = llama()
    theirs = get_peft_model(twin(model), PeftConfig(**ALL, init_lora_weights=init))
    pyfast.apply(model, LoraConfig(**ALL, init_lora_weights=init))
    with torch.no_grad():
        for name, parameter in trainable(theirs).items():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(model.get_parameter(name))
    for path, module in theirs.named_modules():
        if type(module).__name__ == "DoraLinearLayer":
            mine = model.get_submodule(plain(path))
            layer = theirs.get_submodule(path.partition(".lora_")[0])
            a, b = (layer.get_submodule(f"lora_{x}.default").weight for x in "AB")
            module.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=a,
                lora_B=b,
                scaling=layer.scaling["default"],
            )
            assert torch.allclose(mine.weight, module.weight, rtol=1e-6), path


def test_untrained_adapter_changes_nothing_and_only_it_trains():
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(bias=True).to(dtype)
        before = logits(model)
        pyfast.apply(model, LoraConfig(**ALL))
        if dtype is torch.float32:  # in bf16 a bias that is added after the product rounds again
            assert torch.equal(logits(model), before)
        assert torch.allclose(logits(model), before, rtol=2e-2, atol=2e-2)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapter = {n: p.clone() for n, p in trainable(model).items()}
    train(model, steps=2)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in base.items())
    assert not any(torch.equal(now[name], p) for name, p in adapter.items())
    with pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_are_pefts(dtype, autocast):
    model = llama().to(dtype)
    theirs = get_peft_model(twin(model), PeftConfig(**ALL), autocast_adapter_dtype=autocast)
    pyfast.apply(model, LoraConfig(**ALL), autocast_adapter_dtype=autocast)
    mine, others = trainable(trained(model)), trainable(trained(theirs))
    assert {n: p.dtype for n, p in mine.items()} == {n: p.dtype for n, p in others.items()}
    assert logits(model).dtype == dtype
    assert torch.allclose(logits(model).float(), logits(theirs).float(), atol=2e-2)


def test_bf16_autocast_trains():
    model, _ = both(llama, {**ALL, "lora_dropout": 0.1})
    ids = token_ids()
    exact = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trainable(model).values())


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("nested", [True, False])
def test_nf4_base(make, nested):
    model, reference, quantised = nf4_and_dense(make, nested=nested)
    before = {path: model.get_submodule(path).weight.clone() for path in quantised}
    pyfast.apply(model, LoraConfig(**ALL))
    theirs = get_peft_model(reference, PeftConfig(fan_in_fan_out=make is gpt2, **ALL))
    trained(model), trained(theirs)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-5)
    assert train(model) == pytest.approx(train(theirs), abs=1e-4)
    for path, bytes_before in before.items():
        assert torch.equal(model.get_submodule(path).base_layer.weight, bytes_before)
    served = logits(model)
    pyfast.merge(model)
    assert torch.allclose(logits(model), served, atol=1e-5)
    pyfast.unmerge(model)
    assert torch.equal(logits(model), served)


# --- several adapters, merging ------------------------------------------------------------------

PAIRS = {
    "dora, dora": ({}, {}),
    "dora, lora": ({}, {"use_dora": False}),
    "lora, dora": ({"use_dora": False}, {}),
    "dropout": ({"lora_dropout": 0.3}, {"lora_dropout": 0.3}),
}


def two(case, make=llama):
    """Ours and PEFT's with adapters x and y, both active."""
    model = make()
    first, second = ({**ALL, **options, "fan_in_fan_out": make is gpt2} for options in PAIRS[case])
    theirs = get_peft_model(twin(model), PeftConfig(**first), adapter_name="x")
    theirs.add_adapter("y", PeftConfig(**second))
    for name, options in (("x", first), ("y", second)):
        pyfast.apply(model, LoraConfig(**options), adapter_name=name)
    trained(model), trained(theirs).eval()  # PEFT's new layers begin in training
    pyfast.set_adapter(model, ["x", "y"])
    theirs.base_model.set_adapter(["x", "y"])
    return model, theirs


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("make", [lambda: llama(bias=True), gpt2])
def test_two_active_adapters_as_in_peft(case, make):
    ours, theirs = two(case, make)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)
    ours.train()
    assert torch.equal(logits(ours), logits(ours)) == (case != "dropout")
    ours.eval()
    with pyfast.adapters_disabled(ours):
        assert torch.equal(logits(ours), logits(make()))
    if case != "dropout":
        assert train(twin(ours)) == pytest.approx(train(twin(theirs)), abs=1e-5)
    for name in "xy":
        pyfast.set_adapter(ours, name)
        theirs.set_adapter(name)
        assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)


@pytest.mark.parametrize("case", ["dora, dora", "dora, lora", "lora, dora"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_equals_pefts_and_is_undone_bit_for_bit(case, make):
    ours, theirs = two(case, make)
    served = logits(ours)
    before = {n: p.clone() for n, p in ours.named_parameters()}
    pyfast.merge(ours)
    theirs.base_model.merge_adapter()
    assert torch.allclose(logits(ours), served, atol=1e-5)
    for path, layer in theirs.named_modules():
        if hasattr(layer, "lora_magnitude_vector"):
            mine = ours.get_submodule(plain(path)).base_layer.weight
            assert torch.allclose(mine, layer.get_base_layer().weight, atol=1e-6), path
    with pyfast.adapters_disabled(ours):
        assert not torch.allclose(logits(ours), served, atol=1e-3)
    pyfast.unmerge(ours)
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())
    assert torch.equal(logits(ours), served)
    bare = pyfast.unload(pyfast.merge(ours))
    assert torch.allclose(logits(bare), served, atol=1e-5)


def test_merge_of_half_weights_rounds_once():
    model = trained(pyfast.apply(llama().to(torch.bfloat16), LoraConfig(**ALL)))
    layer = model.model.layers[0].mlp.up_proj
    a, b, m = (p.double() for _, p in layer.adapter_tensors("default"))
    total = layer.weight.double() + layer.scaling["default"] * b @ a
    exact = total * (m / total.norm(dim=1))[:, None]
    pyfast.merge(model)
    assert layer.weight.dtype == torch.bfloat16
    error = (layer.weight.double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() * (1 + 1e-4)).all()


def test_delete_leaves_the_base():
    model = llama()
    before, keys = logits(model), list(model.state_dict())
    pyfast.apply(model, LoraConfig(**ALL), adapter_name="a")
    pyfast.delete_adapter(model, "a")
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys


# --- refusals -----------------------------------------------------------------------------------


def test_values_of_the_wrong_kind():
    model = llama()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="use_dora='yes' must be True or False"):
        pyfast.apply(model, LoraConfig(use_dora="yes"))
    assert fingerprint(model) == before


def test_a_base_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UnsupportedError, match=r"use_dora: '0\.weight' lies on the meta device"):
        pyfast.apply(model, LoraConfig(target_modules=["0"], use_dora=True))
    assert type(model[0]) is nn.Linear


def test_a_failure_half_way_changes_nothing(monkeypatch):
    model = pyfast.apply(llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="a")
    before, calls, norms = fingerprint(model), [], lora.row_norms

    def fails(*args):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        return norms(*args)

    monkeypatch.setattr(lora, "row_norms", fails)
    with pytest.raises(torch.OutOfMemoryError):
        pyfast.apply(model, LoraConfig(**ALL))
    assert fingerprint(model) == before


def test_norms_that_are_not_finite_are_not_merged():
    model, _ = both(llama, ALL)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_magnitude_vector["default"].weight[3] = torch.nan
    before = fingerprint(model)
    with pytest.raises(NonFiniteError, match=r"1 non-finite values in .*lora_magnitude_vector"):
        pyfast.merge(model)
    assert fingerprint(model) == before


def test_offloaded_weights_are_refused():
    model, _ = both(llama, ALL)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="hooks may have replaced its forward: remove"):
        logits(model)
    model, _ = both(llama, ALL)
    expected = logits(model)
    for name, module in list(model.named_modules()):
        if "lora_A" in name and isinstance(module, nn.Linear):
            accelerate.cpu_offload(module, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="'default' lies on the meta device"):
        logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.allclose(logits(model), expected, atol=1e-6)
