# SPDX-License-Identifier: Apache-2.0
"""Packed records give the loss and the gradients of each record alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import pyfast
from pyfast.errors import UnsupportedError
from pyfast.train import finetune
from pyfast.train.config import DatasetOptions, FinetuneConfig, PromptOptions
from pyfast.train.data import IGNORED, load_data
from pyfast.train.loop import Trainer
from pyfast.train.model import Place, choose_place, prepare_model, trainable_parameters
from pyfast.train.packing import (
    check_records,
    collate_packed,
    fill_rows,
    prepare_packing,
    row_capacity,
)
from pyfast.train.run import seed_everything
from tests.family_models import VARIANTS, variant
from tests.packed import compare, examples

DECODERS = [name for name in VARIANTS if not name.startswith(("t5", "recurrent"))]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("capacity", [24, 200], ids=["rows", "row"])
def test_loss_and_gradients_are_those_of_each_record_alone(name: str, capacity: int) -> None:
    items = examples([5, 17, 9, 2, 12, 24, 7])
    # Gemma's norms and Gemma 2's softmax are computed in fp32 whatever the model's dtype.
    compare(variant(name).double(), items, capacity, 1e-5 if "gemma" in name else 1e-11)


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "nemo"])
def test_virtual_tokens_are_in_front_of_each_record(encoder: str) -> None:
    model = variant("llama").double()
    kind = {"encoder_reparameterization_type": encoder.upper(), "encoder_hidden_size": 16}
    pyfast.apply(model, pyfast.PromptEncoderConfig(num_virtual_tokens=4, **kind)).double()
    items = examples([5, 17, 9])
    capacity = row_capacity(model, 17)
    assert len(fill_rows([5, 17, 9], capacity)) == 1
    compare(model, items, capacity, 1e-11)


def test_rows_are_filled_and_hold_each_record_once() -> None:
    assert fill_rows([3, 8, 5, 4], 8) == [[1], [2, 0], [3]]
    assert fill_rows([9, 1], 8) == [[0], [1]]
    lengths = np.random.default_rng(0).integers(1, 65, 300).tolist()
    rows = fill_rows(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(300))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 64
    assert sum(filled) / (64 * len(rows)) > 0.95


def test_layout() -> None:
    first, second, third = items = examples([3, 2, 4])
    batch = collate_packed(items, 5, 99, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [
        [*third.tokens.tolist(), 99],
        [*first.tokens.tolist(), *second.tokens.tolist()],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    no = IGNORED
    (*_, c), (_, d), (_, x, y, z) = (item.tokens.tolist() for item in items)
    assert batch["labels"].tolist() == [[no, x, y, z, no], [no, no, c, no, d]]


class Leaking(transformers.LlamaForCausalLM):
    """Does not read positions, as a model whose attention knows nothing of packing."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: variant("recurrent_gemma"), "the recurrent scan and the convolution run along"),
        (lambda: variant("t5"), "is an encoder-decoder"),
        (lambda: Leaking(variant("llama").config), "computes packed records otherwise"),
    ],
    ids=["recurrent_gemma", "t5", "leaking"],
)
def test_models_that_would_leak_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        prepare_packing(make(), examples([9, 7]), Place(torch.device("cpu"), torch.float32, ""))
    assert str(caught.value).endswith("Fix: --dataset.packing false")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon-rw", "mixtral"])
def test_models_that_do_not_leak_are_taken(name: str, dtype: torch.dtype) -> None:
    check_records(variant(name).to(dtype), examples([9, 7]), dtype)


class Otherwise(transformers.LlamaForCausalLM):
    """Packed tokens, of which `chosen` says by their positions, have other logits than they should."""

    chosen: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, position_ids=position_ids, **kwargs)
        if position_ids is not None:
            output.logits[self.chosen(position_ids)] += 1.0
        return output


def test_what_shows_in_few_records_is_rounding_and_at_the_beginning_of_all_a_leak() -> None:
    model, items = Otherwise(variant("llama").config), examples([9, 7, 30, 5, 8, 12, 3, 11])
    model.chosen = lambda positions: torch.arange(positions.shape[1])[None] % 25 == 24
    check_records(model, items, torch.float32)
    model.chosen = lambda positions: positions == 0
    with pytest.raises(UnsupportedError, match="computes packed records otherwise"):
        check_records(model, items, torch.float32)


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Prompts and answers of very different lengths."""
    file = tmp_path / "uneven.jsonl"
    rows = [{"prompt": "q" * (1 + i % 5), "completion": f"{i:0{1 + i % 31}}"} for i in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def trainer(config: FinetuneConfig) -> Trainer:
    place = choose_place(config.run)
    seed_everything(0)
    model, tokenizer = prepare_model(config, place)
    data = load_data(config, tokenizer)
    values = (config, place, model, tokenizer, trainable_parameters(model), data)
    return Trainer(*values, Path(config.output_dir or ""))


@pytest.mark.parametrize("method", ["lora", "p-tuning", "sft"])
def test_steps_do_not_depend_on_packing_or_accumulation(
    make_config: Any, uneven: str, method: str
) -> None:
    """Gradients too: a step changes the weights, so that the second loss would tell."""
    found = []
    for packing, size, accumulation in (
        (False, 8, 1),
        (False, 2, 4),
        (True, 8, 1),
        (True, 2, 4),
    ):
        options = DatasetOptions(packing=packing, max_length=48, eval_fraction=0.25)
        config = make_config(
            method=method,
            data=uneven,
            batch_size=size,
            accumulation=accumulation,
            dataset=replace(options, split_by="prompt"),
            prompt=PromptOptions(tokens=3, hidden=16),
        )
        config.adapter.dropout = 0.0
        one = trainer(config)
        rows = [one.step() for _ in range(3)]
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
    for other in found[1:]:
        torch.testing.assert_close(
            torch.tensor(other), torch.tensor(found[0]), rtol=1e-4, atol=1e-6
        )


def test_packed_run(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"steps": 8, "batch_size": 8, "accumulation": 1}
    losses = []
    for packing in (False, True):
        config = make_config(**options, dataset=DatasetOptions(packing=packing))
        config.output_dir += str(packing)
        config.adapter.dropout = 0.0
        losses.append(finetune(config).eval_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "8 steps of 8 records, packed, peak" in capsys.readouterr().out
