# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA on a GPU train as PEFT trains them, and by our kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import pyfast
from pyfast import ops
from tests.models import llama, randomise, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "layers": 3}


def losses_and_adapter(model, steps=10):
    """Losses of a few optimiser steps on one batch, and the adapter afterwards in float64."""
    ids = token_ids(4, 48).cuda()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, {name: p.detach().double() for name, p in trained.items()}


def exact_twin(model):
    """The same adapted model in float64: the oracle of what rounding does."""
    return copy.deepcopy(model).double()


def assert_no_worse_than(ours, theirs, exact):
    """Ours is as near to float64's losses and adapter as PEFT's own run in the same dtype."""
    assert exact[0][-1] < exact[0][0] - 0.2
    for got, plain, want in zip(ours[0], theirs[0], exact[0], strict=True):
        assert abs(got - want) <= 2 * abs(plain - want) + 0.01 * want
    off, plain_off, size = (0.0, 0.0, 0.0)
    for name, want in exact[1].items():
        off += (ours[1][name] - want).square().sum().item()
        plain_off += (theirs[1][name] - want).square().sum().item()
        size += want.square().sum().item()
    assert off**0.5 <= 1.5 * plain_off**0.5 + 0.01 * size**0.5


def adapted(model, **options):
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
    return randomise(get_peft_model(model, config)).cuda()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_lora(autocast_adapter_dtype):
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    theirs = randomise(
        get_peft_model(
            llama(**SIZES).bfloat16(), config, autocast_adapter_dtype=autocast_adapter_dtype
        )
    ).cuda()
    ours, exact = copy.deepcopy(theirs), exact_twin(theirs)
    report = pyfast.accelerate(ours)
    assert len(report.served) == 21
    with ops.recorded_kernels() as ran:
        got = losses_and_adapter(ours)
    assert "reference" not in {name for _, name in ran}
    ops_here = ("lora_linear", "lora_group")
    assert {op for op, _ in ran} == {f"{op}{end}" for op in ops_here for end in ("", "_backward")}
    assert_no_worse_than(got, losses_and_adapter(theirs), losses_and_adapter(exact))


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(**SIZES).bfloat16().save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def load():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": 0}
        )
        return adapted(model)

    ours, theirs = load(), load()
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for path, module in theirs.base_model.model.named_modules():
        if path.endswith("base_layer"):
            state = module.weight.quant_state
            from bitsandbytes.functional import dequantize_4bit

            plain = dense.get_submodule(path.removesuffix(".base_layer"))
            plain.weight.data = dequantize_4bit(module.weight.data, state).double().cpu()
    exact = adapted(dense).double()
    exact.load_state_dict(
        {n: p.double() for n, p in theirs.state_dict().items() if "lora_" in n}, strict=False
    )
    assert len(pyfast.accelerate(ours).served) == 21
    with ops.recorded_kernels() as ran:
        got = losses_and_adapter(ours)
    assert "reference" not in {name for _, name in ran}
    assert {name for op, name in ran if op == "nf4_dequantize"} == {"nf4_dequantize_cuda"}
    assert {"lora_group", "lora_linear"} <= {op for op, _ in ran}
    assert_no_worse_than(got, losses_and_adapter(theirs), losses_and_adapter(exact))
