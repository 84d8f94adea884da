# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of LoRA+ against PEFT's optimiser."""

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

import pyfast
from pyfast import LoraConfig
from pyfast.errors import ConfigError, NoGradientError
from tests.models import llama, plain, token_ids

RATES = {"lr": 1e-3, "loraplus_lr_ratio": 16.0}
CONFIGS = {
    "linears": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}


def settings(model, groups):
    """Name to rate and decay of every parameter in the groups."""
    names = {id(parameter): plain(name) for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_rates_are_pefts(name):
    ours = pyfast.apply(llama(bias=True), LoraConfig(**CONFIGS[name]))
    theirs = peft.get_peft_model(llama(bias=True), peft.LoraConfig(**CONFIGS[name]))
    made = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, **RATES, loraplus_weight_decay=0.1, loraplus_lr_embedding=2e-6
    )
    found = pyfast.loraplus_groups(ours, **RATES, weight_decay=0.1, loraplus_lr_embedding=2e-6)
    expected = settings(theirs, made.param_groups)
    if name == "dora":  # PEFT's decay shrinks the norms too
        expected = {n: (r, 0.0 if "magnitude" in n else d) for n, (r, d) in expected.items()}
    assert settings(ours, found) == expected
    assert len({rate for rate, _ in expected.values()}) == (3 if name == "embedding" else 2)
    assert all(group["params"] for group in found)


def test_steps_are_pefts():
    ours = pyfast.apply(llama(), LoraConfig(target_modules="all-linear"))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    twins = {plain(name): parameter for name, parameter in theirs.named_parameters()}
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            twins[name].copy_(parameter)
    losses = []
    for model, optimizer in (
        (ours, torch.optim.AdamW(pyfast.loraplus_groups(ours, **RATES))),
        (theirs, create_loraplus_optimizer(theirs, torch.optim.AdamW, **RATES)),
    ):
        losses.append([])
        for _ in range(5):
            loss = model(input_ids=token_ids(), labels=token_ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_trainer_schedules_each_rate(tmp_path):
    model = pyfast.apply(llama(), LoraConfig(target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW(pyfast.loraplus_groups(model, **RATES))
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[Watch()],
    ).train()
    assert seen[0][0] == pytest.approx(5e-4)
    assert seen[0][1] == pytest.approx(16 * 5e-4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio=0 must be a positive number"),
        ({"loraplus_lr_ratio": True}, "loraplus_lr_ratio=True must be"),
        ({"lr": float("nan")}, "lr=nan must be"),
        ({"loraplus_lr_embedding": "x"}, "loraplus_lr_embedding='x' must be"),
    ],
)
def test_rates_that_are_no_positive_numbers(changes, text):
    model = pyfast.apply(llama(), LoraConfig())
    with pytest.raises(ConfigError, match=text):
        pyfast.loraplus_groups(model, **RATES | changes)


def test_model_without_lora():
    for model in (llama(), pyfast.apply(llama(), pyfast.IA3Config())):
        with pytest.raises(NoGradientError, match=r"none of the \d+ trained tensors"):
            pyfast.loraplus_groups(model, **RATES)
