# SPDX-License-Identifier: Apache-2.0
"""What the LoRA layers keep for a backward: x for dA and dW, z for dB, the seed for dx and dA."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import ops
from pyfast.ops import OPS
from pyfast.ops.lora_group import lora_group
from pyfast.testing import seeded
from tests.cases import dora_args, packed

M, N, K, R = 64, 48, 96, 8
SETS = [wanted for wanted in itertools.product((False, True), repeat=4) if any(wanted)]


def saved(call, *known):
    """What a call gives, and the bytes that it saves besides the parameters and constants `known`."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call()
    known = {t.data_ptr() for t in known}
    return y, sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in known)


def leaves(device, dtype, wanted, *shapes):
    made = (
        seeded(s, seed=i, dtype=dtype, device=device, scale=0.1) for i, s in enumerate(shapes, 1)
    )
    return [t.requires_grad_(want) for t, want in zip(made, wanted, strict=True)]


def gradients(ys, tensors, dys):
    """None for a tensor that wants none."""
    made = iter(torch.autograd.grad(ys, [t for t in tensors if t.requires_grad], dys))
    return [next(made) if t.requires_grad else None for t in tensors]


def assert_among(got, every):
    for one, like in zip(got, every, strict=True):
        if one is not None:
            torch.testing.assert_close(one, like)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", SETS)
def test_a_layer(wanted, dtype, dropout, device):
    want_x, want_w, want_a, want_b = wanted
    shapes, size = ((M, K), (N, K), (R, K), (N, R)), dtype.itemsize
    tensors, full = (leaves(device, dtype, w, *shapes) for w in (wanted, (True,) * 4))

    def run(x, w, a, b):
        torch.manual_seed(1)
        return saved(lambda: ops.lora_linear(x, w, a, b, scale=2.0, dropout=dropout), w, a, b)

    y, kept = run(*tensors)
    expected = M * K * size * (want_a or want_w) + M * R * size * want_b
    assert kept == expected + 16 * (dropout > 0 and (want_x or want_a))
    dy = seeded((M, N), seed=9, dtype=dtype, device=device)
    if dtype is torch.float32 or device == "cpu":  # on a GPU other kernels round differently
        y_full, _ = run(*full)
        assert_among(gradients(y, tensors, dy), gradients(y_full, full, dy))


@pytest.mark.parametrize("want_a", [False, True])
def test_a_layer_over_nf4_that_is_trained_beyond_its_input(want_a, device):
    codes, absmax, *_ = packed(N, K, device)
    wanted = (True, want_a, False)
    x, a, b = leaves(device, torch.float32, wanted, (M, K), (R, K), (N, R))
    bias = torch.zeros(N, device=device, requires_grad=True)
    y, kept = saved(
        lambda: ops.lora_linear(x, codes, a, b, scale=1.0, absmax=absmax, bias=bias),
        codes, a, b, absmax,
    )  # fmt: skip
    assert kept == M * K * 4 * want_a
    y.sum().backward()
    w = ops.nf4_dequantize(codes, absmax, (N, K), torch.float32)
    torch.testing.assert_close(x.grad, (w + b @ a).detach().sum(0).expand(M, K))
    assert torch.equal(bias.grad, torch.full_like(bias, M))


@pytest.mark.parametrize("wanted", SETS)
def test_a_group(wanted, device):
    """The first member wants what is asked; of the second only B may want a gradient, as the first's."""
    _, want_w, want_a, want_b = wanted
    shapes = ((M, K), (N, K), (R, K), (N, R), (N, K), (3, K), (N, 3))
    tensors = leaves(device, torch.float32, (*wanted, False, False, want_b), *shapes)
    x, *rest = tensors
    members = rest[:3], rest[3:]
    ws, a, b = zip(*members, strict=True)
    ys, kept = saved(lambda: lora_group(x, ws, a, b, scales=(2.0, 2.0)), *rest)
    assert kept == M * K * 4 * (want_a or want_w) + M * (R + 8) * 4 * want_b
    plain = [x @ w.t() + 2 * (x @ a.t()) @ b.t() for w, a, b in members]
    dys = [seeded((M, N), seed=seed, device=device) for seed in (8, 9)]
    used = [i for i, y in enumerate(plain) if y.requires_grad]
    got, want = (
        gradients([each[i] for i in used], tensors, [dys[i] for i in used]) for each in (ys, plain)
    )
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", SETS)
def test_dora(wanted):
    """By the op that serves CUDA; y is the caller's, but for hooks it is among what is kept."""
    _, want_a, want_b, want_m = wanted
    full = dora_args((M,), N, K, R, "cpu", torch.float32)
    x, w, a, b, magnitude, *rest = full
    tensors = [
        t.detach().requires_grad_(want)
        for t, want in zip((x, a, b, magnitude), wanted, strict=True)
    ]
    x, a, b, magnitude = tensors
    y, kept = saved(
        lambda: OPS["dora_linear"].call(x, w, a, b, magnitude, *rest)[0],
        w, a, b, magnitude, rest[0],
    )  # fmt: skip
    assert kept == 4 * M * (K * (want_a or want_m) + R * want_b + N * want_m)
    dy = seeded((M, N), seed=9)
    every = gradients(OPS["dora_linear"].call(*full)[0], (full[0], *full[2:5]), dy)
    assert_among(gradients(y, tensors, dy), every)


def test_an_input_may_change_where_no_gradient_reads_it():
    x, w, a, b = leaves(
        "cpu", torch.float32, (False, False, False, True), (M, K), (N, K), (R, K), (N, R)
    )
    y = ops.lora_linear(x, w, a, b, scale=1.0)
    z = x @ a.t()
    x.zero_()
    y.sum().backward()
    torch.testing.assert_close(b.grad, z.sum(0).expand(N, R))
