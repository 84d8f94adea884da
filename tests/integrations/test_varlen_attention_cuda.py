# SPDX-License-Identifier: Apache-2.0
"""Packed records through varlen kernels on a GPU: as near to float64 as each record alone under SDPA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.utils.import_utils import is_flash_attn_2_available

import pyfast
from pyfast.integrations import varlen_attention
from pyfast.integrations.varlen_attention import NAME, PackedMask
from pyfast.train import attention
from pyfast.train.model import Place
from pyfast.train.packing import prepare_packing, row_capacity
from tests.family_models import variant
from tests.packed import alone, examples, gradients, packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="torch's varlen kernels are for compute capability 8.0 and newer",
    ),
]

PLACE = Place(torch.device("cuda"), torch.bfloat16, "")
LENGTHS = [5, 17, 9, 2, 40, 24, 7, 33]
# The largest heads and grouped ones, one head of keys for all, windows shorter than records.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128},
    "gpt_neox": {},
    "gpt2": {},
    "mistral": {},
    "gemma3": {"head_dim": 256},
    "codegemma": {},
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that torch's kernels are called with; making a mask is an error."""
    calls, original = [], varlen_attention.varlen_attn

    def spy(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(query.dtype)
        return original(query, *args, **options)

    def dense(mask: PackedMask) -> None:
        raise AssertionError("the mask was made")

    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    monkeypatch.setattr(varlen_attention, "varlen_attn", spy)
    monkeypatch.setattr(PackedMask, "dense", property(dense))
    return calls


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Root mean square over all gradients, as a share of theirs."""
    assert found.keys() == exact.keys()
    off = sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)
    return (off / sum(float(each.square().sum()) for each in exact.values())) ** 0.5


def compare_with_alone(model: Any, expected: str, plain: str = "sdpa") -> None:
    """Loss and gradients of packed records against float64; those of each alone under plain attention say
    what bf16 may cost."""
    items = examples(LENGTHS)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation(plain)
    exact = copy.deepcopy(reference).double()
    prepare_packing(model, items, PLACE)
    assert model.config._attn_implementation == expected
    loss = packed(model, items, row_capacity(model, 48))
    found = gradients(model, loss)
    exact_loss = alone(exact, items)
    wanted = gradients(exact, exact_loss)
    assert error(found, wanted) <= 1.2 * error(
        gradients(reference, alone(reference, items)), wanted
    )
    torch.testing.assert_close(loss.detach().double(), exact_loss.detach(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_packed_records_are_as_near_to_float64_as_each_alone(
    name: str, kernels: list[torch.dtype]
) -> None:
    model = variant(name, **MODELS[name]).cuda().bfloat16()
    compare_with_alone(model, NAME)
    layers = model.config.get_text_config().num_hidden_layers
    assert (
        kernels == [torch.bfloat16] * 3 * layers
    )  # the trial, with and without gradients; the records


def test_rows_with_padding(kernels: list[torch.dtype]) -> None:
    """Rows of limited length too, whose padding is records of one token."""
    varlen_attention.register()
    model, items = variant("mistral").cuda().bfloat16(), examples(LENGTHS)
    expected = gradients(model, alone(model, items))
    model.set_attn_implementation(NAME)
    found = gradients(model, packed(model, items, 48))
    assert error(found, {name: each.double() for name, each in expected.items()}) < 3e-2
    assert len(kernels) == 2


def test_virtual_tokens_are_in_front_of_each_record(kernels: list[torch.dtype]) -> None:
    model = variant("llama").cuda().bfloat16()
    pyfast.apply(model, pyfast.PromptEncoderConfig(num_virtual_tokens=4))
    compare_with_alone(model, NAME)
    assert kernels == [torch.bfloat16] * 6


def test_full_fine_tuning_computes_under_autocast(kernels: list[torch.dtype]) -> None:
    model, items = variant("llama").cuda(), examples(LENGTHS)
    with torch.autocast("cuda", torch.bfloat16):
        expected = gradients(model, alone(model, items))
    prepare_packing(model, items, PLACE)
    assert model.config._attn_implementation == NAME
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(model, packed(model, items, 2**62))
    assert kernels == [torch.bfloat16] * 6
    assert error(found, {name: each.double() for name, each in expected.items()}) < 3e-2


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_is_sdpas(name: str, kernels: list[torch.dtype]) -> None:
    model = variant(name, use_cache=True).cuda().bfloat16()
    ids = torch.arange(3, 27, device="cuda").view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    varlen_attention.register()
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    assert not kernels


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_softcaps_go_through_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    model = variant("gemma2").cuda().bfloat16()
    compare_with_alone(model, "flex_attention", "eager")
    ids = torch.arange(3, 15, device="cuda")[None]  # evaluation may generate
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, use_cache=True).shape == (1, 16)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_flash_attn_comes_first(name: str) -> None:
    compare_with_alone(variant(name).cuda().bfloat16(), "flash_attention_2")
