# SPDX-License-Identifier: Apache-2.0
"""PEFT's own `adapter_names` on models under `pyfast.accelerate`: the numbers that PEFT alone gives."""

import peft
import pytest
import torch

import pyfast
from tests.integrations.test_accelerate import four_bit, pytestmark, saved
from tests.models import llama, logits, randomise, token_ids, twin

__all__ = ["pytestmark", "saved"]

NAMES = ["b", "__base__", "c", "b", "c"]


def two(model):
    """A PEFT model with the adapters b, which is active, and c."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    model = peft.get_peft_model(model, config, adapter_name="b")
    model.add_adapter(
        "c", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "embed_tokens"])
    )
    return randomise(model).eval()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_adapter_names_of_an_accelerated_model(saved, quantized, grad):
    ours = two(four_bit(saved) if quantized else llama())
    theirs = twin(ours)
    report = pyfast.accelerate(ours)
    assert len(report.served) == 14
    ids = token_ids(5)
    before = logits(ours, ids)
    with torch.set_grad_enabled(grad):
        got = ours(input_ids=ids, adapter_names=NAMES).logits
        expected = theirs(input_ids=ids, adapter_names=NAMES).logits
    # In eval bitsandbytes' own layers compute in another precision on a CPU.
    near = {"rtol": 1e-2, "atol": 5e-3} if quantized else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, expected, **near)
    for row, name in enumerate(NAMES):
        with ours.disable_adapter() if name == "__base__" else torch.no_grad():
            if name != "__base__":
                ours.set_adapter(name)
            alone = logits(ours, ids[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    ours.set_adapter("b")
    torch.testing.assert_close(logits(ours, ids), before)
    if grad:
        for model, y in ((ours, got), (theirs, expected)):
            model.zero_grad()
            y.log_softmax(-1)[..., 0].sum().backward()
        wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        assert {".b." in name for name in wanted} == {True}
        for name, parameter in ours.named_parameters():
            if name in wanted:
                error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
                assert error < (1e-2 if quantized else 1e-4), name


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_adapter_names(saved, beams):
    ours = two(four_bit(saved))
    theirs = twin(ours)
    pyfast.accelerate(ours)
    how = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "adapter_names": NAMES}
    ids = token_ids(5)
    assert torch.equal(ours.generate(input_ids=ids, **how), theirs.generate(input_ids=ids, **how))


def test_wrong_names_are_refused_by_peft_as_ever():
    ours = two(llama())
    pyfast.accelerate(ours)
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(input_ids=token_ids(2), adapter_names=["b", "d"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        ours(input_ids=token_ids(2), adapter_names=["b"])
