# SPDX-License-Identifier: Apache-2.0
"""What `pyfast.accelerate` leaves to PEFT: tuners inside of LoRA, scales that are tensors, biased factors."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import pyfast
from tests.models import llama, logits, randomise, token_ids

TARGETS = ["q_proj", "k_proj"]
INNER = {
    "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, init_weights=False, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, init_weights=False, target_modules=TARGETS
    ),
}


def lora(**options):
    config = peft.LoraConfig(**{"r": 4, "target_modules": [*TARGETS, "v_proj"], **options})
    return randomise(peft.get_peft_model(llama(), config))


def reasons(report):
    return {row.path.rpartition(".")[2]: row.reason for row in report.left}


@pytest.mark.parametrize("kind", INNER)
def test_an_adapter_of_another_kind_inside_is_not_lost(kind):
    model = peft.get_peft_model(llama(), INNER[kind](), mixed=True, adapter_name="inner")
    model.add_adapter("outer", peft.LoraConfig(r=4, target_modules=[*TARGETS, "v_proj"]))
    model.set_adapter(["inner", "outer"])
    plain = copy.deepcopy(randomise(model))
    left = reasons(pyfast.accelerate(model))
    assert [left.get(name) for name in (*TARGETS, "v_proj")] == [
        *["its base layer carries adapters of another kind"] * 2,
        None,
    ]
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    for each in (model, plain):
        each(input_ids=token_ids()).logits.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_replaced_factor_keeps_its_bias(factor, late):
    model, plain = lora(), lora()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    for each, served_first in ((model, late), (plain, False)):
        if served_first:
            pyfast.accelerate(each)
        torch.manual_seed(0)
        layer = each.get_submodule(path)
        rows, columns = layer._modules[factor]["default"].weight.shape
        layer._modules[factor]["default"] = nn.Linear(columns, rows, bias=True)
    assert reasons(pyfast.accelerate(model))["q_proj"] == f"it has a bias in {factor}"
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_hot_swap(compiled, late, tmp_path):
    first, second = lora(lora_alpha=8), lora(r=6, lora_alpha=30)
    expected = logits(first), logits(second)
    for name, model in {"first": first, "second": second}.items():
        model.save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "first").eval()
    if late:
        pyfast.accelerate(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    left = reasons(pyfast.accelerate(model))
    assert left["q_proj"] == "its scale is a tensor, as PEFT's compiled hot-swap needs it"
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    assert torch.allclose(logits(run), expected[0], atol=1e-5)
    hotswap_adapter(model, tmp_path / "second", adapter_name="default", torch_device="cpu")
    assert torch.allclose(logits(run), expected[1], atol=1e-5)
