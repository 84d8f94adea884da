# SPDX-License-Identifier: Apache-2.0
"""Every family and variant by every method: trained, saved, merged, and compared with a reference."""

import pytest
import torch
import transformers

import pyfast
from tests.family_models import VARIANTS, batch, gradients, outputs, variant
from tests.matrix.methods import METHODS, dequantised

pytestmark = [
    # PEFT asks transformers for a property by its old name, and looks for the base model's config.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    # A file of an NF4 base does not say that a dense base has `Conv1D`; PEFT sees it.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # The oracle of a mixture of experts has no adapters there either.
    pytest.mark.filterwarnings("ignore:target_modules='all-linear' adapts linear:UserWarning"),
    # PEFT adds patterns of rank and alpha for Mixtral's experts, adapted or not.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
STEPS, RATE = 5, 5e-3


def cells(chosen=lambda method: True):
    """Every variant by every method, or by those that are chosen."""
    columns = {name: method for name, method in METHODS.items() if chosen(method)}
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(n, m, id=f"{n}-{c}")
            for n in VARIANTS
            for c, m in columns.items()
            if m.variants is None or n in m.variants
        ],
    )


def base(method, name):
    """What `apply` gets."""
    return method.prepare(variant(name))


def dense(method, name):
    """What the oracle gets: the same values, dense."""
    return dequantised(base(method, name), variant(name))


def trained(model, name_of=str):
    """Name to parameter of all that is trained."""
    return {name_of(n): p for n, p in model.named_parameters() if p.requires_grad}


def shaken(model, *, std=0.05):
    """Change all that is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(trained(model).items()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(std * noise.to(parameter.dtype))
    return model


def pair(method, name, *, dtype=torch.float32):
    """Our model and the oracle's, with the same values in all that is trained."""
    ours = pyfast.apply(base(method, name).to(dtype), method.config())
    theirs = method.oracle(dense(method, name).to(dtype))
    mine, other = trained(shaken(ours)), trained(theirs, method.renamed)
    assert mine.keys() == other.keys()
    with torch.no_grad():
        for path, parameter in mine.items():
            other[path].copy_(parameter)
    return ours, theirs


def steps(model):
    """Losses of a training loop."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=RATE, weight_decay=0)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def close(got, expected, message=None):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=message)


@cells(lambda method: method.neutral)
def test_an_untrained_model_gives_the_bases_outputs(name, method):
    model = base(method, name)
    expected = outputs(model)
    close(outputs(pyfast.apply(model, method.config())), expected)
    close(expected, outputs(dense(method, name)))


@cells()
def test_gradients_reach_exactly_what_is_trained_and_equal_the_oracles(name, method):
    dtype, tolerance = (torch.float64, 1e-9) if method.exact else (torch.float32, 1e-4)
    mine, other = pair(method, name, dtype=dtype)
    ours, theirs = gradients(mine), gradients(other, method.renamed)
    applied = pyfast.apply(base(method, name), method.config())
    assert ours.keys() == {path for path, _ in applied.named_parameters() if method.trains(path)}
    assert ours.keys() == theirs.keys()
    for path, gradient in ours.items():
        assert gradient.abs().max() > 0, path
        torch.testing.assert_close(gradient, theirs[path], rtol=tolerance, atol=tolerance)


@cells()
def test_losses_of_training_are_the_oracles_and_fall(name, method):
    ours, theirs = (steps(model) for model in pair(method, name))
    close(ours, theirs)
    assert ours[-1] < ours[0]


@cells()
def test_generate_gives_the_oracles_tokens(name, method):
    made = []
    for model in pair(method, name):
        ids = {"input_ids": batch(model)["input_ids"], "attention_mask": torch.ones(2, 12).long()}
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
        made.append(model.eval().generate(**ids, **options))
    assert torch.equal(*made)


@cells()
def test_what_is_saved_gives_the_same_outputs_in_a_fresh_base(name, method, tmp_path):
    model = shaken(pyfast.apply(base(method, name), method.config()))
    expected = outputs(model)
    method.save(model, tmp_path)
    # Weights that lie elsewhere in memory may be summed in another order.
    loaded = outputs(method.load(base(method, name), tmp_path))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=2e-6)
    if method.oracle_load is not None:
        close(outputs(method.oracle_load(dense(method, name), tmp_path)), expected)


@cells(lambda method: method.merges)
def test_merged_outputs_are_the_unmerged_ones_and_survive_saving(name, method, tmp_path):
    model = base(method, name)
    before = outputs(model)
    expected = outputs(shaken(pyfast.apply(model, method.config()), std=method.shake))
    assert not torch.allclose(expected, before, atol=1e-2)
    close(outputs(pyfast.merge(model)), expected)
    assert torch.equal(outputs(pyfast.unmerge(model)), expected)
    pyfast.unload(pyfast.merge(model)).save_pretrained(tmp_path)
    close(outputs(type(model).from_pretrained(tmp_path)), expected)


@cells()
def test_trainer_with_accumulation_gives_the_losses_of_a_loop(name, method, tmp_path):
    """Each of its steps takes all rows, one at a time."""
    trained_by, looped = (
        shaken(pyfast.apply(base(method, name), method.config())) for _ in range(2)
    )
    columns = batch(looped)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),
        logging_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=trained_by, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(steps(looped)[: len(losses)].tolist(), abs=1e-4)
