# SPDX-License-Identifier: Apache-2.0
"""What `torch.utils.flop_counter` counts for the ops: as for the same layers written with torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pyfast
from pyfast import ops
from pyfast.ops import OPS
from pyfast.ops.lora_group import lora_group
from pyfast.testing import seeded
from tests.cases import bottleneck_args, dora_args, packed

F = torch.nn.functional
M, N, K, R = 6, 24, 40, 3
SETS = list(itertools.product((False, True), repeat=4))


def counted(call):
    """FLOPs of a forward and of the backward through all of its outputs."""
    with FlopCounterMode(display=False) as forward:
        ys = call()
        ys = ys if isinstance(ys, tuple) else (ys,)
    with FlopCounterMode(display=False) as backward:
        ys = [y for y in ys if y.requires_grad]
        if ys:
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    return forward.get_total_flops(), backward.get_total_flops()


def tensor(shape, wanted=False, dtype=torch.float32):
    return seeded(shape, seed=1, dtype=dtype).requires_grad_(wanted)


def plain(x, w, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("wanted", SETS)
def test_a_layer_as_its_composition(wanted):
    want_x, want_w, want_a, want_b = wanted
    x, w, a, b = map(tensor, ((2, 3, K), (N, K), (R, K), (N, R)), wanted)
    forward, backward = counted(lambda: ops.lora_linear(x, w, a, b, scale=2.0))
    assert forward == 2 * M * N * K + 2 * M * K * R + 2 * M * R * N
    assert backward == (
        2 * M * N * K * (want_x + want_w)
        + 2 * M * N * R * (want_b + (want_x or want_a))
        + 2 * M * K * R * (want_a + want_x)
    )
    assert (forward, backward) == counted(lambda: plain(x, w, a, b))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("wanted", SETS)
def test_a_group_as_its_layers(wanted, count):
    """Members of other sizes, of which the first wants what is asked, the others all."""
    x = tensor((M, K), wanted[0])
    sizes = [(N, 3), (8, 16), (16, 5)][:count]
    wants = [wanted[1:], *[(False, True, True)] * (count - 1)]
    members = [
        tuple(map(tensor, ((n, K), (r, K), (n, r)), want))
        for (n, r), want in zip(sizes, wants, strict=True)
    ]
    ws, a, b = zip(*members, strict=True)
    got = counted(lambda: lora_group(x, ws, a, b, scales=[1.0] * count))
    assert got == counted(lambda: tuple(plain(x, *each) for each in members))
    assert got[0] == sum(2 * M * (n * K + K * r + r * n) for n, r in sizes)


def test_a_backward_of_one_member():
    x, ws = tensor((M, K), True), [tensor((n, K)) for n in (N, 8)]
    a = [tensor((r, K), True) for r in (3, 16)]
    b = [tensor((n, r), True) for n, r in ((N, 3), (8, 16))]
    for i, (n, r) in enumerate([(N, 3), (8, 16)]):
        with FlopCounterMode(display=False) as counter:
            lora_group(x, ws, a, b, scales=[1.0] * 2)[i].sum().backward()
        forward = sum(2 * M * (n * K + K * r + r * n) for n, r in ((N, 3), (8, 16)))
        assert counter.get_total_flops() == forward + 2 * M * (n * K + 2 * n * r + 2 * r * K)


@pytest.mark.parametrize("want_x", [False, True])
def test_nf4_layers(want_x):
    codes, absmax, *_ = packed(N, K, "cpu")
    x, bias = tensor((2, 3, K), want_x), tensor((N,), True)
    forward, backward = counted(lambda: ops.nf4_linear(x, codes, absmax, bias, out_features=N))
    assert (forward, backward) == (2 * M * N * K, 2 * M * N * K * want_x)
    a, b = tensor((R, K), True), tensor((N, R), True)
    got = counted(lambda: ops.lora_linear(x, codes, a, b, scale=1.0, absmax=absmax, dropout=0.5))
    assert got == counted(lambda: plain(x, tensor((N, K)), a, b))


def test_dora():
    """Of the op that serves CUDA too, whose dm needs no product."""
    x, w, a, b, magnitude, norms, *rest = dora_args((M,), N, K, R, "cpu", torch.float32)
    got = counted(lambda: OPS["dora_linear"].call(x, w, a, b, magnitude, norms, *rest)[0])
    assert got == counted(lambda: plain(x, w, a, b) * (magnitude / norms))
    assert got == counted(lambda: ops.dora_linear(x, w, a, b, magnitude, norms, scale=1.0))
    norms_flops = 2 * N * K * R
    assert counted(lambda: ops.dora_norms(w, a, b, scale=1.0)) == (norms_flops, 0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "wanted",
    [(0, 1, 2, 3, 4, 5, 6), (0,), (1,), (2,), (3,), (4,), (5,), (1, 2), (0, 2), (2, 4)],
)
def test_the_bottleneck(wanted, norm):
    *params, activation, eps = bottleneck_args(
        (M,), K, R, "cpu", torch.float32, norm=norm, biases=True, activation="silu"
    )
    for i, each in enumerate(params):
        if each is not None:
            each.requires_grad_(i in wanted)
    x, down, up, down_bias, up_bias, weight, bias = params

    def ours():
        return ops.adapter_bottleneck(
            x, down, up, down_bias=down_bias, up_bias=up_bias, norm_weight=weight, norm_bias=bias,
            activation=activation, eps=eps,
        )  # fmt: skip

    def composition():
        inner = F.layer_norm(x, (K,), weight, bias, eps) if norm else x
        return x + F.linear(F.silu(F.linear(inner, down, down_bias)), up, up_bias)

    assert counted(ours) == counted(composition)
    assert counted(ours)[0] == 4 * M * K * R


def test_a_model_by_its_modules():
    """Nothing twice where torch makes the products, and a backward without dx."""
    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.ReLU(), torch.nn.Linear(N, K))
    pyfast.apply(model, pyfast.LoraConfig(r=R, target_modules=["0"]))
    with FlopCounterMode(display=False) as counter:
        model(tensor((M, K))).sum().backward()
    found = counter.get_flop_counts()["Sequential.0"]
    assert {op._qualified_op_name: count for op, count in found.items()} == {
        "pyfast::lora_linear": 2 * M * (N * K + K * R + R * N),
        "pyfast::lora_linear_backward": 2 * M * (2 * N * R + K * R),
    }
