# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the bottleneck adapter: which ones run, and how near they are to float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import ops
from pyfast.ops import _library
from pyfast.testing import seeded

pytestmark = pytest.mark.gpu

F = torch.nn.functional
HALVES = (torch.bfloat16, torch.float16)
NAMES = ("down_bias", "up_bias", "norm_weight", "norm_bias")
OPTIONS = [(), ("norm_weight",), ("down_bias", "up_bias"), NAMES]
SHAPES = [
    # rows, features, bottleneck
    (1, 64, 8),
    (7, 136, 24),
    (63, 1032, 32),
    (64, 8, 8),
    (130, 4096, 64),
    (300, 768, 256),
    (513, 520, 200),
    (700, 4096, 16),
    (1000, 2056, 128),
    (1100, 520, 256),
    (8191, 1024, 64),
    (257, 16384, 40),
    # above 64 ranks Hopper has kernels of its own: edges of their tiles, clusters of 1 to 8
    (1, 72, 72),
    (127, 8, 96),
    (129, 4104, 136),
    (128, 200, 256),
    (1023, 4104, 200),
    (2500, 320, 128),
    (8200, 264, 72),
    (17000, 64, 256),
]
CUDA = [
    ("adapter_bottleneck", "adapter_bottleneck_cuda"),
    ("adapter_bottleneck_backward", "adapter_bottleneck_cuda"),
]


def operands(shape, dtype, options=NAMES, spread=1.0, mean=0.0):
    """The leaves, by name, and dy."""
    m, k, r = shape
    sizes = {
        "x": ((m, k), spread),
        "down": ((r, k), k**-0.5),
        "up": ((k, r), r**-0.5),
        "down_bias": ((r,), 1.0),
        "up_bias": ((k,), 1.0),
        "norm_weight": ((k,), 0.3),
        "norm_bias": ((k,), 0.3),
    }
    made = {
        name: seeded(size, seed=i, dtype=dtype, device="cuda", scale=scale)
        for i, (name, (size, scale)) in enumerate(sizes.items())
        if name not in NAMES or name in options
    }
    made["x"] = made["x"] + mean
    if "norm_weight" in made:
        made["norm_weight"] = made["norm_weight"] + 1
    dy = seeded((m, k), seed=20, dtype=dtype, device="cuda")
    return {name: tensor.requires_grad_() for name, tensor in made.items()}, dy


def plain(x, down, up, down_bias=None, up_bias=None, norm_weight=None, norm_bias=None, *, act):
    n = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    activate = getattr(F, act) if isinstance(act, str) else act
    return x + F.linear(activate(F.linear(n, down, down_bias)), up, up_bias)


def ours(x, down, up, *, act, **options):
    return ops.adapter_bottleneck(x, down, up, activation=act, **options)


def run(function, leaves, dy, act="silu", dtype=None):
    """y and all gradients, by name."""
    if dtype is not None:
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves.items()}
    y = function(**leaves, act=act)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def check(leaves, dy, act="silu"):
    """No worse than plain torch: root mean square by 1.1, maximum by 2 (few values: 3 and 4)."""
    with ops.recorded_kernels() as ran:
        got = run(ours, leaves, dy, act)
    assert ran == CUDA
    if act == "relu":
        # Rounding decides the sign of a few h, and that whether they have a gradient at all: all take ours.
        args = [
            None if t is None else t.detach() for t in map(leaves.get, ("x", "down", "up", *NAMES))
        ]
        open_mr = ops.OPS["adapter_bottleneck"].overload(*args, act, 1e-5)[1] > 0
        act = lambda h: h * open_mr  # noqa: E731
    exact, same = run(plain, leaves, dy, act, torch.float64), run(plain, leaves, dy, act)
    for name, e in exact.items():
        assert (got[name].shape, got[name].dtype) == (e.shape, dy.dtype), name
        mine, theirs = (got[name].double() - e).abs(), (same[name].double() - e).abs()
        slack = e.abs().max() * 1e-5
        mean, most = (1.1, 2.0) if e.numel() >= 10_000 else (3.0, 4.0)
        assert mine.square().mean().sqrt() <= mean * theirs.square().mean().sqrt() + slack, name
        assert mine.max() <= most * theirs.max() + slack, name


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_near_to_float64_as_torch(shape, dtype, options):
    for act in ("silu", "gelu", "relu"):
        check(*operands(shape, dtype, options), act)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_far_from_zero_of_any_size(dtype):
    for spread, mean in itertools.product((0.01, 1.0, 100.0), (0.0, 10.0)):
        check(*operands((300, 1024, 64), dtype, spread=spread, mean=mean * spread))


def test_equal_elements_have_no_deviation():
    leaves, dy = operands((70, 264, 16), torch.bfloat16, spread=0.0, mean=3.0)
    check(leaves, dy)


@pytest.mark.parametrize("options", [(), NAMES], ids=["none", "all"])
def test_gradients_that_nobody_wants(options):
    leaves, dy = operands((130, 264, 24), torch.bfloat16, options)
    every = run(ours, leaves, dy)
    for count in (1, 2, len(leaves) - 1):
        for wanted in itertools.combinations(leaves, count):
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in wanted)
            y = ours(**leaves, act="silu")
            grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy)
            for name, grad in zip(wanted, grads, strict=True):
                assert torch.equal(grad, every[name]), (name, wanted)


def test_layouts():
    leaves, dy = operands((24, 264, 24), torch.bfloat16)
    x = leaves["x"].detach()
    wide = torch.full((24, 2 * 264 + 8), float("nan"), dtype=x.dtype, device="cuda")
    wide[:, 8:272] = x
    odd = torch.full((24, 267), float("nan"), dtype=x.dtype, device="cuda")
    odd[:, 1:265] = x
    expected = run(ours, leaves, dy)
    for layout in (wide[:, 8:272], odd[:, 1:265], x.t().contiguous().t()):
        for g in (dy, dy.t().contiguous().t()):
            got = run(ours, {**leaves, "x": layout.detach().requires_grad_()}, g)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
    axes = run(ours, {**leaves, "x": x.view(2, 12, 264).requires_grad_()}, dy.view(2, 12, 264))
    assert axes["y"].shape == axes["x"].shape == (2, 12, 264)
    assert torch.equal(axes["x"].view(24, 264), expected["x"])
    scattered = {n: t.detach().clone() for n, t in leaves.items()}
    for name in ("down", "up"):
        scattered[name] = scattered[name].t().contiguous().t()
    base = torch.empty(265, dtype=x.dtype, device="cuda")
    base[1:] = scattered["norm_weight"]
    scattered["norm_weight"] = base[1:]
    got = run(ours, {n: t.requires_grad_() for n, t in scattered.items()}, dy)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_results_repeat_and_a_replayed_graph_gives_them():
    leaves, dy = operands((1030, 1032, 64), torch.bfloat16)
    first = run(ours, leaves, dy)
    for _ in range(10):
        again = run(ours, leaves, dy)
        assert all(torch.equal(again[name], first[name]) for name in first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(ours, leaves, dy)
    for tensor in captured.values():
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(captured[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("k", "r", "dtype", "reason"),
    [
        (60, 8, torch.bfloat16, "features must be a multiple of 8, got 60"),
        (64, 12, torch.bfloat16, "size must be a multiple of 8 up to 256, got 12"),
        (64, 264, torch.float16, "size must be a multiple of 8 up to 256, got 264"),
        (64, 8, torch.float32, "kernels for float16 and bfloat16, not torch.float32"),
    ],
)
def test_what_the_kernels_do_not_serve_falls_back_and_says_why(k, r, dtype, reason, monkeypatch):
    monkeypatch.setattr(_library, "_warned", set())
    leaves, dy = operands((5, k, r), dtype)
    with ops.recorded_kernels() as ran, pytest.warns(UserWarning, match=reason):
        got = run(ours, leaves, dy)
    assert {kernel for _, kernel in ran} == {"reference"}
    expected = run(plain, leaves, dy, dtype=torch.float64)
    for name, e in expected.items():
        assert (got[name].double() - e).norm() <= 0.02 * e.norm()


def test_a_backward_without_statistics_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(_library, "_warned", set())
    leaves, dy = operands((5, 64, 8), torch.bfloat16)
    x, down, up, w, b = (leaves[n].detach() for n in ("x", "down", "up", *NAMES[2:]))
    h = seeded((5, 8), seed=1, dtype=dy.dtype, device="cuda")
    args = (dy, h, x, down, up, w, b, "silu", 1e-5, [True] * 7)
    op = ops.OPS["adapter_bottleneck_backward"]
    with pytest.warns(UserWarning, match="the norm's statistics were not handed on"):
        got = op.overload(*args)
    assert all(map(torch.equal, got, op.reference(*args)))


# --- adapter_scale ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 136), (8191, 1032), (300, 16384)], ids=str)
def test_the_backward_of_a_scale(shape, dtype, kind):
    leaves = [
        seeded(size, seed=i, dtype=t, device="cuda").requires_grad_()
        for i, (size, t) in enumerate(((shape, dtype), (shape[1:], kind)))
    ]
    dy = seeded(shape, seed=3, dtype=dtype, device="cuda")

    def grads():
        return torch.autograd.grad(ops.adapter_scale(*leaves), leaves, dy)

    with ops.recorded_kernels() as ran:
        dx, dscale = grads()
    assert ran == [
        ("adapter_scale", "adapter_scale_cuda"), ("adapter_scale_backward", "adapter_scale_backward_cuda")
    ]  # fmt: skip
    assert torch.equal(dx, (dy.float() * leaves[1].float()).to(dtype))
    exact = (dy.double() * leaves[0].double()).sum(0)
    assert dscale.dtype == kind
    error, size = (dscale.double() - exact).abs().max(), exact.abs().max()
    assert error <= size * (torch.finfo(kind).eps + 1e-5)
    again = grads()
    assert torch.equal(again[0], dx)
    assert torch.equal(again[1], dscale)
    for i, full in enumerate((dx, dscale)):
        leaves[1 - i].requires_grad_(False)
        (one,) = torch.autograd.grad(ops.adapter_scale(*leaves), leaves[i], dy)
        leaves[1 - i].requires_grad_()
        assert torch.equal(one, full)


@pytest.mark.parametrize("kind", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 136), (8191, 1032), (3, 100, 16384)], ids=str)
def test_a_scale_is_torchs_bit_for_bit(shape, dtype, kind):
    x = seeded(shape, seed=1, dtype=dtype, device="cuda")
    scale = seeded(shape[-1:], seed=2, dtype=kind, device="cuda")
    pitched = torch.cat([x, x], -1)[..., shape[-1] :]
    spread = torch.stack([scale, scale], 1)[:, 0]
    expected = (x.float() * scale.float()).to(dtype)
    for inputs, factors in ((x, scale), (pitched, spread)):
        with ops.recorded_kernels() as ran:
            got = ops.adapter_scale(inputs, factors)
        assert ran == [("adapter_scale", "adapter_scale_cuda")]
        assert got.is_contiguous()
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 12), torch.bfloat16), ((4, 16), torch.float64), ((0, 16), torch.bfloat16)],
)
def test_a_scale_that_torch_multiplies(shape, dtype):
    x, scale = (seeded(s, seed=1, dtype=dtype, device="cuda") for s in (shape, shape[-1:]))
    with ops.recorded_kernels() as ran:
        got = ops.adapter_scale(x, scale)
    ((_, name),) = ran
    assert name.startswith("adapter_scale_torch (")
    assert torch.equal(got, x * scale)


def test_a_scales_backward_of_any_layout():
    x, dy = (seeded((24, 264), seed=s, dtype=torch.bfloat16, device="cuda") for s in (1, 2))
    scale = seeded((264,), seed=3, device="cuda")
    backward = ops.OPS["adapter_scale_backward"].overload
    expected = backward(dy, x, scale, [True, True])
    spread = torch.stack([scale, scale], 1)[:, 0]
    for layout in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, 264:], x.view(2, 12, 264)):
        for g in (dy.view(layout.shape), dy.t().contiguous().t().reshape(layout.shape)):
            got = backward(g, layout, spread, [True, True])
            assert torch.equal(got[0].view(24, 264), expected[0])
            assert torch.equal(got[1], expected[1])
    wide = torch.cat([dy, dy], 1)[:, :264]
    assert torch.equal(backward(wide, x, scale, [True, False])[0], expected[0])
