# SPDX-License-Identifier: Apache-2.0
"""The cells of the matrix: our model and the oracle's, and how either one is trained."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyfast
from tests.family_models import VARIANTS, batch, variant
from tests.matrix.methods import METHODS

MARKS = [
    # PEFT looks for the base model's config.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    # A file of an NF4 base does not say that a dense base has `Conv1D`; PEFT sees it.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # The oracle of a mixture of experts has no adapters there either.
    pytest.mark.filterwarnings("ignore:target_modules='all-linear' adapts linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:adapter .* vectors of experts:UserWarning"),
    # PEFT adds patterns of rank and alpha for Mixtral's experts, adapted or not.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
STEPS, RATE = 20, 5e-3
EPS = 1e-6
"""Of AdamW in float64. It divides a gradient by its own size: what is lost in rounding of the smallest ones
grows to a millionth of a loss in twenty steps, unless this is above them."""


def all_cells():
    """Every variant with the name of every method that is for it."""
    return [
        (name, column)
        for name in VARIANTS
        for column, method in METHODS.items()
        if method.variants is None or name in method.variants
    ]


def cells(chosen=lambda method: True):
    """Every variant by every method, or by those that are chosen."""
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(name, METHODS[column], id=f"{name}-{column}")
            for name, column in all_cells()
            if chosen(METHODS[column])
        ],
    )


def base(method, name):
    """What `apply` gets."""
    return method.prepare(variant(name))


def dense(method, name):
    """What the oracle gets: the same values, dense."""
    return method.values(variant(name))


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


def copied(mine, other):
    """Give the oracle our values; both map names to parameters."""
    assert mine.keys() == other.keys()
    with torch.no_grad():
        for path, parameter in mine.items():
            other[path].copy_(parameter)


def pair(method, name, *, dtype=torch.float32):
    """Our model and the oracle's, with the same values in all that is trained; whatever the dtype, these are
    float32's."""
    ours = shaken(pyfast.apply(base(method, name), method.config()))
    theirs = method.oracle(dense(method, name))
    copied(trained(ours), trained(theirs, method.renamed))
    return ours.to(dtype), theirs.to(dtype)


@dataclass(frozen=True)
class Training:
    """Losses of all steps, and the first one's logits and gradients by our names."""

    losses: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def logits_of(model):
    """Logits for `batch`; no labels are given that the model could take a loss of."""
    inputs = batch(model)
    if not model.config.is_encoder_decoder:
        del inputs["labels"]
    return model(**inputs).logits


def loss_of(model, logits):
    """The mean over all answers, at least in float32."""
    labels = batch(model)["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten())


def train(model, name_of=str, *, steps=STEPS, eps=1e-8):
    """A loop that leaves to the model nothing but its logits."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=RATE, weight_decay=0, eps=eps)
    losses, first = [], None
    for _ in range(steps):
        logits = logits_of(model)
        loss = loss_of(model, logits)
        loss.backward()
        if first is None:
            named = {name_of(n): p.grad for n, p in model.named_parameters()}
            first = logits.detach(), {n: g.clone() for n, g in named.items() if g is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Training(torch.tensor(losses, dtype=torch.float64), *first)


def train_both(name, method):
    """Our training and the oracle's, in float64."""
    ours, theirs = pair(method, name, dtype=torch.float64)
    return train(ours, eps=EPS), train(theirs, method.renamed, eps=EPS)


def close(got, expected, *, tolerance=1e-4):
    """Assert that tensors are equal to within a relative or absolute tolerance."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_falls(losses):
    """Assert that the last loss is below the first, and every five steps' mean below that before."""
    assert losses[-1] < losses[0]
    assert bool((losses.view(-1, 5).mean(dim=1).diff() < 0).all()), losses
