# SPDX-License-Identifier: Apache-2.0
"""Every family and variant by every method against a reference: outputs, gradients, training, answers."""

import functools
import gc

import pytest
import torch
import transformers

import pyfast
from tests.family_models import VARIANTS, batch, outputs
from tests.matrix.cells import (
    EPS,
    MARKS,
    RATE,
    assert_falls,
    base,
    cells,
    close,
    dense,
    pair,
    shaken,
    train_both,
    trained,
)
from tests.matrix.methods import METHODS

pytestmark = MARKS
THIRTEEN = {
    "GPT-3": ("gpt2", "gpt_neox", "gptj"),
    "Nemotron": ("nemotron",),
    "Llama": ("llama",),
    "ChatGLM": ("glm",),
    "Falcon": ("falcon",),
    "StarCoder": ("gpt_bigcode",),
    "StarCoder 2": ("starcoder2",),
    "Mistral": ("mistral",),
    "Mixtral": ("mixtral",),
    "Gemma": ("gemma",),
    "Gemma 2": ("gemma2",),
    "RecurrentGemma": ("recurrent_gemma",),
    "T5": ("t5",),
}
SIX = ("SFT", "LoRA", "QLoRA", "P-tuning", "Adapters", "IA3")


@pytest.fixture(scope="module")
def both():
    """Twenty steps of our model and the oracle's, made once for all tests of a cell."""
    return functools.cache(train_both)


@pytest.fixture(scope="module")
def _frozen_garbage():
    """Trainer collects garbage whenever it ends, and need not look through all that lives already."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_no_cell_of_thirteen_families_and_six_methods_is_missing():
    there = [tuple(cell.values) for cell in cells().args[1]]
    for kinds in THIRTEEN.values():
        for kind in kinds:
            rows = [name for name, values in VARIANTS.items() if values["model_type"] == kind]
            assert rows
            assert all((name, METHODS[column]) in there for name in rows for column in SIX)


@cells()
def test_an_untrained_model_gives_the_bases_outputs(name, method):
    """Virtual tokens are no part of the base's input: there, as soon as they are turned off."""
    model = base(method, name)
    expected = outputs(model)
    close(expected, outputs(dense(method, name)))
    pyfast.apply(model, method.config())
    if method.neutral:
        close(outputs(model), expected, tolerance=1e-6)
        return
    assert not torch.allclose(outputs(model), expected, atol=1e-3)
    with pyfast.adapters_disabled(model):
        assert torch.equal(outputs(model), expected)


@cells()
def test_outputs_are_the_oracles(name, method, both):
    ours, theirs = both(name, method)
    close(ours.logits, theirs.logits, tolerance=1e-9)


@cells()
def test_gradients_reach_exactly_what_is_trained_and_equal_the_oracles(name, method, both):
    ours, theirs = (side.gradients for side in both(name, method))
    applied = pyfast.apply(base(method, name), method.config())
    named = {path for path, _ in applied.named_parameters() if method.trains(path)}
    assert ours.keys() == theirs.keys() == trained(applied).keys() == named
    for path, gradient in ours.items():
        assert gradient.abs().max() > 0, path
        close(gradient, theirs[path], tolerance=1e-9)


@cells()
def test_losses_of_twenty_steps_are_the_oracles_and_fall(name, method, both):
    ours, theirs = (side.losses for side in both(name, method))
    close(ours, theirs, tolerance=1e-7)
    assert len(ours) == 20
    assert_falls(ours)


@cells()
def test_generate_gives_the_oracles_tokens(name, method):
    made = []
    for model in pair(method, name):
        ids = {"input_ids": batch(model)["input_ids"], "attention_mask": torch.ones(2, 12).long()}
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
        made.append(model.eval().generate(**ids, **options))
    assert torch.equal(*made)


@cells()
@pytest.mark.usefixtures("_frozen_garbage")
def test_trainer_with_accumulation_gives_the_oracles_losses(name, method, both, tmp_path):
    """Each of its steps takes all rows, one at a time, and the model's own loss."""
    model = shaken(pyfast.apply(base(method, name), method.config()))
    columns = batch(model)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),
        logging_steps=1,
        learning_rate=RATE,
        adam_epsilon=EPS,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _, theirs = both(name, method)
    assert losses == pytest.approx(theirs.losses[:2].tolist(), abs=1e-4)
