# SPDX-License-Identifier: Apache-2.0
"""Varlen attention under transformers: boundaries, what is computed through them, and what is left to SDPA.

The kernels are CUDA's. Here a loop over the records in float64 stands for them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

import pyfast
from pyfast.errors import UnsupportedError
from pyfast.integrations import varlen_attention
from pyfast.integrations.varlen_attention import NAME, TRIAL, PackedMask
from tests.family_models import VARIANTS, variant
from tests.models import llama, logits, token_ids
from tests.packed import compare, examples, gradients, looped, packed

varlen_attention.register()

# Falcon has attention of its own, Gemma 2 a softcap.
SERVED = [name for name in VARIANTS if not name.startswith(("t5", "recurrent", "falcon", "gemma2"))]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Kernels for the CPU; the dtypes they were called with."""
    calls = []

    def spy(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(query.dtype)
        return looped(query, *args, **options)

    monkeypatch.setattr(varlen_attention, "has_kernels", lambda device: True)
    monkeypatch.setattr(varlen_attention, "_DTYPES", (torch.bfloat16, torch.float64))
    monkeypatch.setattr(varlen_attention, "varlen_attn", spy)
    monkeypatch.setattr(varlen_attention, "_GROUPED", {"enable_gqa": True})
    return calls


@pytest.fixture
def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is made all the same is an error."""

    def dense(mask: PackedMask) -> None:
        raise AssertionError("the mask was made")

    monkeypatch.setattr(PackedMask, "dense", property(dense))


def switched(model: Any) -> Any:
    """A copy of a model with varlen attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(NAME)
    return twin


# --- boundaries ---------------------------------------------------------------------------------

POSITIONS = {
    "ragged": [[0, 1, 2, 0, 0, 1, 2, 3]],
    "rows": [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 0]],
    "padding": [[0, 1, 2, 0, 0, 0], [0, 1, 0, 1, 2, 3]],
    "single tokens": [[0, 0, 0, 0]],
    "decreasing": [[5, 4, 3, 2, 1]],
    "constant": [[7, 7, 7]],
    "jumps": [[0, 1, 5, 6, 7, 9, 2]],
    "virtual tokens": [[3, 4, 5, 0, 1, 2, 3, 0, 1]],
    "one row of positions for all": [[0, 1, 0, 1, 2]],
}


def boundaries(positions: list[list[int]], rows: int) -> list[int]:
    """Oracle: a record ends where the next token's position is not one more, and with its row."""
    found = []
    for number in range(rows):
        row = positions[number % len(positions)]
        for index, position in enumerate(row):
            if index == 0 or position != row[index - 1] + 1:
                found.append(number * len(row) + index)
    return [*found, rows * len(positions[0])]


def mask_of(kind: str, positions: list[list[int]], rows: int, **more: Any) -> Any:
    """The mask that a model with full, sliding (3) or chunked (2) attention makes."""
    config = transformers.LlamaConfig(attn_implementation=NAME)
    config.sliding_window, config.attention_chunk_size = 3, 2
    make = {
        "full": create_causal_mask,
        "sliding": create_sliding_window_causal_mask,
        "chunked": create_chunked_causal_mask,
    }[kind]
    embeddings = torch.zeros(rows, len(positions[0]), 1)
    return make(config, embeddings, None, None, torch.tensor(positions), **more)


@pytest.mark.parametrize("kind", ["full", "sliding", "chunked"])
@pytest.mark.parametrize("name", POSITIONS)
def test_boundaries(name: str, kind: str) -> None:
    positions = POSITIONS[name]
    rows = 3 if name.startswith("one row") else len(positions)
    mask = mask_of(kind, positions, rows)
    records = mask.records
    if kind != "chunked":  # a chunk's end is a boundary too
        assert records.bounds.tolist() == boundaries(positions, rows)
    assert records.bounds.dtype == torch.int32
    assert records.longest == int(records.bounds.diff().max())
    # Records and window say all that SDPA's mask says.
    length = len(positions[0])
    token = torch.arange(rows * length)
    record = torch.bucketize(token, records.bounds[1:], right=True)
    distance = token[:, None] - token
    seen = (record[:, None] == record) & (distance >= 0)
    if mask.window[0] >= 0:
        seen &= distance <= mask.window[0]
    for row in range(rows):
        place = slice(row * length, (row + 1) * length)
        assert torch.equal(seen[place, place], mask.dense[row, 0])
        assert not seen[place, : row * length].any()


def test_random_boundaries() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        positions = torch.randint(0, 3, (3, 17), generator=draw).tolist()
        assert mask_of("full", positions, 3).records.bounds.tolist() == boundaries(positions, 3)


def test_tokens_that_attend_to_later_ones_have_no_records() -> None:
    blocks = torch.tensor([[-1, 0, 0, -1, -1]])
    mask = mask_of("full", [[0, 1, 2, 0, 1]], 1, block_sequence_ids=blocks)
    assert mask.records is None
    assert mask.dense[0, 0, 1, 2]


def test_rows_of_one_record_need_no_mask() -> None:
    assert mask_of("full", [[0, 1, 2], [4, 5, 6]], 2) is None


# --- packed records -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("capacity", [24, 200], ids=["rows", "row"])
def test_loss_and_gradients_are_those_of_each_record_alone(
    name: str, capacity: int, kernels: list[torch.dtype], no_mask: None
) -> None:
    items = examples([5, 17, 9, 2, 12, 24, 7])
    compare(switched(variant(name).double()), items, capacity, 1e-5 if "gemma" in name else 1e-11)
    assert len(kernels) == 2  # layers


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_virtual_tokens_are_in_front_of_each_record(
    name: str, kernels: list[torch.dtype], no_mask: None
) -> None:
    model = variant(name).double()
    pyfast.apply(model, pyfast.PromptEncoderConfig(num_virtual_tokens=4)).double()
    model.set_attn_implementation(NAME)
    compare(model, examples([5, 17, 9, 1]), 2**62, 1e-11)
    assert len(kernels) == 2


def test_boundaries_are_read_once_also_where_layers_are_computed_again(
    kernels: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = [], varlen_attention.Records
    monkeypatch.setattr(
        varlen_attention, "Records", lambda *values: made.append(original(*values)) or made[-1]
    )
    model, items = variant("llama").double(), examples([5, 17, 9])
    expected = gradients(model, packed(model, items, 24))
    twin = switched(model).train()
    enable = getattr(twin, "activation_checkpointing_enable", None)
    (enable or twin.gradient_checkpointing_enable)({"use_reentrant": False})
    found = gradients(twin, packed(twin, items, 24))
    assert (len(made), len(kernels)) == (1, 4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_positions_may_be_changed_in_place_between_calls(kernels: list[torch.dtype]) -> None:
    model = llama().double()
    twin, ids = switched(model), token_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for values in ([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]):
        positions.copy_(torch.tensor([values]))
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        found, expected = (each(**inputs).logits for each in (twin, model))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert len(kernels) == 4  # none for the row of one record


def test_autocast_is_sdpas(kernels: list[torch.dtype]) -> None:
    model, items = llama(), examples([5, 17, 9])
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (packed(each, items, 24) for each in (model, switched(model)))
    assert kernels == [torch.bfloat16] * 2
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


# --- everything else is SDPA's ------------------------------------------------------------------


def same(model: Any, **inputs: Any) -> None:
    """A model gives the same bits with varlen attention as with SDPA."""
    outputs = []
    for each in (model, switched(model)):
        torch.manual_seed(0)
        outputs.append(each(**inputs).logits)
    assert torch.equal(*outputs)


PACKED = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 2),
    "use_cache": False,
}


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: llama(), PACKED),
        (lambda: llama(), {"attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12])}),
        (lambda: llama(), {}),
        (lambda: variant("mistral"), {}),
        (lambda: llama(attention_dropout=0.5).train().double(), PACKED),
        (lambda: llama(head_dim=12).double(), PACKED),
        (lambda: llama(head_dim=264).double(), PACKED),
        (lambda: llama(is_causal=False).double(), PACKED),
    ],
    ids=["float32", "mask", "plain", "window", "dropout", "head 12", "head 264", "two ways"],
)
def test_what_the_kernels_do_not_serve_is_sdpas(
    model: Any, inputs: Any, kernels: list[torch.dtype]
) -> None:
    same(model(), input_ids=token_ids(), **inputs)
    assert not kernels


def test_without_kernels_packed_records_are_sdpas() -> None:
    same(llama().bfloat16(), input_ids=token_ids(), **PACKED)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_is_sdpas(name: str, kernels: list[torch.dtype]) -> None:
    model, ids = variant(name, use_cache=True).double(), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = [m.generate(ids, attention_mask=mask, **options) for m in (model, switched(model))]
    assert torch.equal(*found)
    assert not kernels


@pytest.mark.parametrize("option", ["softcap", "position_bias", "s_aux", "sinks"])
def test_options_of_other_attention_go_to_sdpa(
    option: str, kernels: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import sdpa_attention

    told: dict[str, Any] = {}
    monkeypatch.setattr(
        sdpa_attention,
        "sdpa_attention_forward",
        lambda module, query, key, value, mask, **others: told.update(others, mask=mask),
    )
    mask = mask_of("full", [[0, 1, 0]], 1)
    state = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    varlen_attention.varlen_attention(torch.nn.Module(), state, state, state, mask, **{option: 1.0})
    assert not kernels
    assert told[option] == 1.0
    assert torch.equal(told["mask"], mask.dense)


@pytest.mark.parametrize("option", ["indices", "block_indices"])
def test_keys_that_a_layer_chose_are_not_ignored(option: str) -> None:
    state = torch.zeros(1, 2, 3, 8)
    given = (torch.nn.Module(), state, state, state, None)
    varlen_attention.varlen_attention(*given, **{option: None})
    with pytest.raises(UnsupportedError, match="keys of its own choice") as caught:
        varlen_attention.varlen_attention(*given, **{option: torch.zeros(1, 3, 1)})
    assert "Fix: --dataset.packing false" in str(caught.value)


def test_in_a_trial_sdpa_does_not_take_what_the_kernels_do_not_serve(
    kernels: list[torch.dtype],
) -> None:
    model, ids = llama(head_dim=12).double(), token_ids()
    model.set_attn_implementation(TRIAL)
    model(input_ids=ids)  # plain rows are SDPA's
    with pytest.raises(UnsupportedError, match="do not take what its attention computes"):
        model(input_ids=ids, **PACKED)
    twin = llama().double()
    twin.set_attn_implementation(TRIAL)
    twin(input_ids=ids, **PACKED)
    assert len(kernels) == 2


def test_the_saved_config_does_not_name_it(tmp_path: Any) -> None:
    model = switched(llama())
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
