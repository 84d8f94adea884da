# SPDX-License-Identifier: Apache-2.0
"""Experts with LoRA in grouped products, against float64 and PEFT's composition, one expert after another."""

from __future__ import annotations

import copy

import pytest
import torch

import pyfast
from pyfast import LoraConfig, ops
from pyfast.nn import expert_lora, grouped_experts
from pyfast.nn.weight import DenseWeight
from pyfast.testing import assert_accurate, seeded
from tests.family_models import variant
from tests.integrations.test_peft_experts import BOTH, experts
from tests.models import randomise

TOKENS = [1, 7, 300]


def layer_of(device, dtype, rank=8, adapters=1):
    """A layer of experts with random adapters, all active."""
    model = pyfast.apply(variant("mixtral"), LoraConfig(target_parameters=BOTH, r=rank))
    randomise(model)
    layer = experts(model).to(device, dtype)
    for inner in layer.nest():
        for more in range(1, adapters):
            inner.add(f"more{more}", rank, 0.5, "gaussian", dtype)
            torch.nn.init.normal_(inner.lora_B[f"more{more}"].weight, std=0.1)
            inner.active = [*inner.active, f"more{more}"]
    return layer.to(device, dtype)


def routed(tokens, device, dtype, count=4, chosen=2):
    """Inputs, chosen experts (the last one never, once a number that none has) and their weights."""
    x = seeded((tokens, 64), seed=1, dtype=dtype, device=device)
    index = torch.stack([torch.randperm(count - 1)[:chosen] for _ in range(tokens)]).to(device)
    index[tokens // 2, 0] = count
    return x, index, seeded((tokens, chosen), seed=2, dtype=dtype, device=device).abs()


def results(layer, x, index, weights, dy):
    """y and the gradients of x, the weights and the factors."""
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    factors = [p for n, p in layer.named_parameters() if "lora_" in n]
    y = layer(leaves[0], index, leaves[1])
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *factors], dy)]


def composed(weight, x, a, b, scale, dropout):
    """PEFT's composition in x's dtype."""
    return x @ weight.tensor.t() + (x @ a.to(x.dtype).t() @ b.to(x.dtype).t()) * scale


@pytest.fixture
def grouped(device, monkeypatch):
    """Whether layers group: on a CPU, whose products take bfloat16 too, by saying that they may."""
    if device == "cpu":
        monkeypatch.setattr(expert_lora, "why_not", lambda module, x, serving: "")
    return device


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS)
def test_as_near_to_float64_as_a_composition(tokens, adapters, grouped, monkeypatch):
    layer = layer_of(grouped, torch.bfloat16, adapters=adapters)
    args = routed(tokens, grouped, torch.bfloat16)
    dy = seeded((tokens, 64), seed=3, dtype=torch.bfloat16, device=grouped)
    with ops.recorded_kernels() as ran:
        got = results(layer, *args, dy)
    assert [entry for entry in ran if entry[0] == "lora_linear"] == [
        ("lora_linear", "lora_linear_grouped_mm")
    ]
    monkeypatch.setattr(expert_lora, "why_not", lambda module, x, serving: "one after another")
    with monkeypatch.context() as patch:
        patch.setattr(DenseWeight, "lora_linear", composed)
        rough = results(layer, *args, dy)
    x, index, weights = args
    wide = copy.deepcopy(layer).double()
    exact = results(wide, x.double(), index, weights.double(), dy.double())
    for i, (g, r, e) in enumerate(zip(got, rough, exact, strict=True)):
        assert_accurate(g, r, e, what=str(i), eps=4e-3 if e.numel() < 10_000 else 1e-5)


def test_results_repeat(grouped):
    layer = layer_of(grouped, torch.bfloat16)
    args = routed(300, grouped, torch.bfloat16)
    dy = seeded((300, 64), seed=3, dtype=torch.bfloat16, device=grouped)
    first = results(layer, *args, dy)
    assert all(map(torch.equal, results(layer, *args, dy), first))


def test_an_infinite_token_stays_by_itself(grouped):
    layer = layer_of(grouped, torch.bfloat16)
    x, index, weights = routed(300, grouped, torch.bfloat16)
    index = index.clamp(max=2)
    x[5] = torch.inf
    finite = torch.isfinite(layer(x, index, weights)).all(1)
    assert not finite[5]
    assert finite.sum() == 299


@pytest.mark.parametrize("value", [1e20, torch.nan])
def test_what_no_expert_takes_reaches_no_gradient(value, grouped):
    layer = layer_of(grouped, torch.bfloat16)
    x, index, weights = routed(9, grouped, torch.bfloat16)
    x[3], index[3], weights[3] = value, 4, value
    dy = seeded((9, 64), seed=3, dtype=torch.bfloat16, device=grouped)
    assert all(t.isfinite().all() for t in results(layer, x, index.clamp(min=1), weights, dy))


REASONS = {
    "a CPU": (lambda layer, x: (layer, x.cpu()), "are for CUDA devices"),
    "float32": (lambda layer, x: (layer.float(), x.float()), "are of bfloat16"),
    "odd ranks": (lambda layer, x: (layer_of(x.device, x.dtype, rank=3), x), "multiples of 8"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REASONS)
def test_what_goes_one_after_another(name):
    change, reason = REASONS[name]
    layer, x = change(
        layer_of("cuda", torch.bfloat16), torch.zeros(3, 64, device="cuda", dtype=torch.bfloat16)
    )
    serving = {i.parameter_name: [i.factors(n) for n in i.active] for i in layer.nest()}
    assert reason in grouped_experts.why_not(layer.frozen, x, serving)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_waits_for_nothing():
    layer = layer_of("cuda", torch.bfloat16)
    args = routed(300, "cuda", torch.bfloat16)
    dy = seeded((300, 64), seed=3, dtype=torch.bfloat16, device="cuda")
    results(layer, *args, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(layer, *args, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
