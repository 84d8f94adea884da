# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels of the bottleneck adapter are launched: by an extension that does on the CPU, through
the pointers and pitches that it is given, what csrc/adapter/adapter.h says."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import _extension, ops
from pyfast.ops import _adapter_launch, _library, adapter
from pyfast.testing import seeded
from tests.ops.lora_extension import DTYPES, at, inputs

F = torch.nn.functional
K, R = 16, 8
VECTORS = ("down_bias", "up_bias", "norm_weight", "norm_bias")
OPTIONS = [(), VECTORS[:2], VECTORS[2:3], VECTORS]


class Extension:
    """csrc/adapter on the CPU; the rest is the real extension's."""

    lora_counters = 32

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return getattr(_extension._module, name)

    def adapter_missing(self, device, r):
        return ""

    def adapter_workspace(self, device, m, k, r):
        return 256

    def problem(self, args):
        (device, stream, dtype, activation, m, k, r, x, pitch_x, down, up, weight, bias, h, stats,
         workspace) = args  # fmt: skip
        assert (device, stream) == (None, 0)
        assert not any(p % 16 for p in (x, down, up, weight, bias, h, workspace))
        assert pitch_x % 8 == 0
        at(workspace, 1, 64, 64, torch.float32).fill_(float("nan"))
        dtype = DTYPES[dtype]

        def vector(address, size):
            return at(address, 1, size, size, dtype)[0].double() if address else None

        x = at(x, m, k, pitch_x, dtype).double()
        down, up = at(down, r, k, k, dtype).double(), at(up, k, r, r, dtype).double()
        stats = at(stats, m + r, 2, 2, torch.float32) if weight else None
        act = getattr(F, ("silu", "gelu", "relu")[activation])
        return (m, k, r, dtype, x, down, up, vector, vector(weight, k), vector(bias, k), act,
                at(h, m, r, r, dtype), stats)  # fmt: skip

    def adapter_forward(self, *args):
        m, k, r, dtype, x, down, up, vector, w, b, act, h, stats = self.problem(args[:16])
        eps, down_bias, up_bias, y = args[16:]
        offset = torch.zeros(r).double() if b is None else down @ b
        offset = offset if not down_bias else offset + vector(down_bias, r)
        n = x
        if w is not None:
            mean, rstd = x.mean(1), (x.var(1, correction=0) + eps).rsqrt()
            stats.copy_(
                torch.cat([torch.stack([mean, rstd], 1), torch.stack([down @ w, offset], 1)])
            )
            n = (x - mean[:, None]) * rstd[:, None] * w
        h.copy_(n @ down.t() + offset)
        shift = vector(up_bias, k) if up_bias else 0
        at(y, m, k, k, dtype).copy_(x + act(h.double()) @ up.t() + shift)
        self.calls.append("forward")
        return "kernels"

    def adapter_backward(self, *args):
        m, k, r, dtype, x, down, up, _, w, b, act, h, stats = self.problem(args[:16])
        dy, pitch_dy, active, *outs = args[16:]
        assert dy % 16 == pitch_dy % 8 == 0
        dy, h = at(dy, m, k, pitch_dy, dtype).double(), h.double().requires_grad_()
        with torch.enable_grad():
            (dh,) = torch.autograd.grad(act(h), h, dy @ up)
        h = h.detach()
        if active:
            at(active, m, r, r, dtype).copy_(act(h))
            assert not outs[2]
        xhat, g = x, dh @ down
        grads = {4: dy.sum(0), 3: dh.sum(0), 2: dy.t() @ act(h)}
        if w is not None:
            mean, rstd = stats[:m].double().unbind(1)
            sums, offset = stats[m:].double().unbind(1)
            xhat = (x - mean[:, None]) * rstd[:, None]
            g = g * w - (dh @ sums / k)[:, None]
            g = (g - xhat * ((dh * (h - offset)).sum(1) / k)[:, None]) * rstd[:, None]
            grads |= {5: (dh @ down * xhat).sum(0), 6: dh.sum(0) @ down}
        n = xhat if w is None else xhat * w
        grads |= {0: dy + g, 1: dh.t() @ (n if b is None else n + b)}
        sizes = [(m, k), (r, k), (k, r), (1, r), (1, k), (1, k), (1, k)]
        for i, out in enumerate(outs):
            if out:
                at(out, *sizes[i], sizes[i][1], dtype).copy_(grads[i].view(sizes[i]))
        self.calls.append("backward")
        return "kernels"


@pytest.fixture(params=["fused", "composed"])
def layer(request, monkeypatch):
    """`adapter_bottleneck` by the launches for CUDA; torch makes dU where it is composed."""
    extension = Extension()
    if request.param == "composed":
        monkeypatch.setattr(_adapter_launch, "FUSED_RANKS", 0)
        monkeypatch.setattr(_adapter_launch, "MANY_ROWS", 2)
    monkeypatch.setattr(_extension, "C", extension)
    monkeypatch.setattr(_extension, "has_cuda", lambda: True)
    monkeypatch.setattr(_adapter_launch, "raw_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_forward_plan", "_backward_plan"):
        monkeypatch.setattr(adapter, name, _library.planned(getattr(adapter, name).__wrapped__))
    monkeypatch.setattr(adapter, "_bottleneck_backward", adapter._bottleneck_backward_kernel)

    def run(x, down, up, *, act="silu", **options):
        args = [options.get(name) for name in VECTORS]
        kernel = adapter._bottleneck_kernel
        return adapter._Bottleneck.apply(kernel, x, down, up, *args, act, 1e-5)[0]

    run.extension = extension
    return run


def operands(options=VECTORS, dtype=torch.bfloat16, x=None):
    shapes = {"down": (R, K), "up": (K, R), "down_bias": (R,)}
    made = {"x": seeded((5, K), seed=1, dtype=dtype) if x is None else x.detach()}
    for i, name in enumerate(("down", "up", *VECTORS)):
        if name not in VECTORS or name in options:
            made[name] = seeded(shapes.get(name, (K,)), seed=2 + i, dtype=dtype, scale=0.4)
    dy = seeded(made["x"].shape, seed=20, dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}, dy


def plain(x, down, up, down_bias=None, up_bias=None, norm_weight=None, norm_bias=None, *, act):
    n = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return x + F.linear(getattr(F, act)(F.linear(n, down, down_bias)), up, up_bias)


def check(layer, leaves, dy, act="silu"):
    y = layer(**leaves, act=act)
    got = (y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy))
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    y = plain(**wide, act=act)
    want = (y.detach(), *torch.autograd.grad(y, list(wide.values()), dy.double()))
    for name, g, e in zip(("y", *leaves), got, want, strict=True):
        assert (g.shape, g.dtype) == (e.shape, dy.dtype), name
        assert (g.double() - e).norm() <= 0.01 * e.norm() + 1e-9, name


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", adapter.ACTIVATIONS)
def test_types_activations_and_options(layer, act, dtype, options):
    check(layer, *operands(options, dtype), act)
    assert layer.extension.calls == ["forward", "backward"]


@pytest.mark.parametrize("name", list(inputs(K)))
def test_layouts_of_x_and_dy(layer, name):
    leaves, dy = operands(x=inputs(K)[name])
    check(layer, leaves, dy)
    leaves, _ = operands(x=inputs(K)[name].clone(memory_format=torch.contiguous_format))
    check(layer, leaves, inputs(K)[name])


def test_layouts_of_the_parameters(layer):
    leaves, dy = operands()
    for name in ("down", "up"):
        leaves[name] = leaves[name].detach().t().contiguous().t().requires_grad_()
    base = torch.empty(K + 1, dtype=dy.dtype)
    base[1:] = leaves["norm_weight"].detach()
    leaves["norm_weight"] = base[1:].requires_grad_()
    check(layer, leaves, dy)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_every_set_of_wanted_gradients(layer, options):
    leaves, dy = operands(options)
    every = dict(
        zip(leaves, torch.autograd.grad(layer(**leaves), list(leaves.values()), dy), strict=True)
    )
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        names = list(itertools.compress(leaves, wanted))
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
        y = layer(**leaves)
        assert y.requires_grad == bool(names)
        grads = torch.autograd.grad(y, [leaves[name] for name in names], dy) if names else ()
        assert all(torch.equal(g, every[name]) for name, g in zip(names, grads, strict=True))


@pytest.mark.parametrize("no_rows", [True, False])
def test_what_is_not_served_is_composed(layer, no_rows):
    x = torch.zeros(0, K).bfloat16() if no_rows else None
    leaves, dy = operands(x=x)
    if not no_rows:
        leaves["down"] = leaves["down"].detach()[:3].clone().requires_grad_()
        leaves["up"] = leaves["up"].detach()[:, :3].clone().requires_grad_()
        leaves["down_bias"] = leaves["down_bias"].detach()[:3].clone().requires_grad_()
    with ops.recorded_kernels() as ran:
        check(layer, leaves, dy)
    assert {kernel for _, kernel in ran} == {"reference"}
    assert layer.extension.calls == []
