# SPDX-License-Identifier: Apache-2.0
"""Groups over bitsandbytes' NF4 layers whose compute dtype is not the input's, as a GPU serves them."""

import sys

import peft
import pytest
import torch
import transformers
from peft import get_peft_model

import pyfast
from pyfast import ops
from pyfast.nn import weight_of
from pyfast.nn.group import Part
from tests.models import llama, randomise, token_ids

pytest.importorskip("bitsandbytes")


def on_any_device(layer, base, a, b, scale, dropout, drops):
    """`part_of` without its condition that NF4 weights lie on a GPU."""
    return Part(weight_of(base), a.weight, b.weight, scale, dropout, drops)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The usual QLoRA model, its norms float32 and its linears' compute dtype bfloat16: ours and PEFT's."""
    monkeypatch.setattr(sys.modules[pyfast.accelerate.__module__], "part_of", on_any_device)
    llama(layers=1).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    made = []
    for _ in range(2):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        made.append(randomise(get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))))
    pyfast.accelerate(made[0])
    return made


def assert_near(got, want):
    assert (got is None) == (want is None)
    if want is not None:
        assert got.dtype is want.dtype
        assert (got - want).norm() <= 0.02 * want.norm()


def assert_same_gradients(ours, theirs):
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(mine.grad, other.grad)


def test_a_step_of_qlora(models):
    losses = []
    with ops.recorded_kernels() as ran:
        for model in models:
            loss = model(input_ids=token_ids(), labels=token_ids()).loss
            loss.backward()
            losses.append(loss.item())
    assert [op for op, _ in ran].count("lora_group") == 2
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert_same_gradients(*models)


@pytest.mark.parametrize("used", ["qkv", "vq", "k"])
def test_members_with_a_backward_each(models, used):
    made = []
    for model in models:
        attention = model.base_model.model.model.layers[0].self_attn
        torch.manual_seed(0)
        x = torch.randn(2, 5, 64, requires_grad=True)
        ys = [getattr(attention, f"{name}_proj")(x) for name in used]
        for y in ys:
            y.square().sum().backward()
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            ys[0].sum().backward()
        made.append([*ys, x.grad])
    for got, want in zip(*made, strict=True):
        assert_near(got, want)
    assert_same_gradients(*models)
