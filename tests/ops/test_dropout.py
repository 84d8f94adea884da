# SPDX-License-Identifier: Apache-2.0
"""dropout: every kernel against the reference bit for bit, statistics, gradients, error texts."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pyfast import _extension, ops
from pyfast.ops import OPS, _philox
from pyfast.testing import seeded
from tests.ops.test_edges import guarded, runnable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (3, 1),
    (3, 7),
    (2, 8),
    (5, 9),
    (7, 64),
    (4, 70),
    (3, 32),
    (2, 288),
    (2, 4099),
    (1000, 33),
    (0, 16),
    (4, 0),
]
PROBABILITIES = [0.0, 1e-6, 0.02, 0.1, 0.5, 0.99999, 1.0]
SEED = [0x0123456789ABCDEF, -0x1122334455667788]


def run(name, x, p, seed, out, *, threads=1):
    """Run the kernel called `name` on a contiguous [rows, columns]."""
    ran = _extension.C.dropout(
        x=x.data_ptr(), out=out.data_ptr(), dtype=_extension.DTYPES[x.dtype], rows=x.shape[0],
        columns=x.shape[1], threshold=_philox.threshold(p), seed=seed.data_ptr(), variant=name,
        **{**_extension.launch_args(x), "threads": threads},
    )  # fmt: skip
    assert ran == name


def bits(tensor):
    """The element bits, in which 0 and -0 differ; every NaN counts as the same."""
    numbers = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return numbers.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_gives_the_reference_and_writes_nothing_else(dtype, p, device):
    seed = torch.tensor(SEED, device=device)
    for shape in SHAPES:
        x = seeded(shape, seed=1, dtype=dtype, device=device, scale=100.0)
        expected = bits(OPS["dropout"].reference(x, p, seed))
        for name in runnable("dropout", device):
            out, intact = guarded(x.numel(), dtype, device, float("nan"))
            for threads in (1, 3):
                run(name, x, p, seed, out, threads=threads)
                assert torch.equal(bits(out.view(shape)), expected), (name, shape)
                assert intact()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_value(dtype, device):
    """Subnormals, values that overflow when scaled, infinities and NaN; a dropped NaN is 0."""
    if dtype == torch.float32:
        info = torch.finfo(dtype)
        kinds = [0.0, -0.0, 1e-45, -1e-40, info.tiny, info.max, -info.max, torch.inf, -torch.inf]
        x = torch.tensor([*kinds, torch.nan] * 40, device=device).view(25, 16)
    else:
        words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        x = words.view(dtype).view(256, 256).to(device)
    seed = torch.tensor(SEED, device=device)
    for p in (0.1, 0.5, 0.9):
        keep = _philox.keep_mask(seed, *x.shape, p)
        exact = x.double() * _philox.keep_scale(p)
        expected = torch.where(keep, x * _philox.keep_scale(p), torch.zeros_like(x))
        # One rounding of the exact product, but for the scale's own rounding to float32.
        torch.testing.assert_close(
            expected.double(),
            torch.where(keep, exact.to(dtype).double(), 0.0),
            rtol=2e-7,
            atol=0,
            equal_nan=True,
        )
        for name in runnable("dropout", device):
            out = torch.empty_like(x)
            run(name, x, p, seed, out)
            assert torch.equal(bits(out), bits(expected)), name


def test_the_op_runs_a_kernel_on_any_layout(device):
    seed = torch.tensor(SEED, device=device)
    wide = torch.full((2, 3, 40), float("nan"), device=device)
    x = seeded((2, 3, 16), seed=1, device=device)
    wide[..., 3:35:2] = x
    expected = OPS["dropout"].reference(x.view(6, 16), 0.4, seed)
    layouts = [x, wide[..., 3:35:2], x.transpose(0, 1).contiguous().transpose(0, 1)]
    strided_seed = seed.repeat_interleave(2)[::2]
    for layout in layouts:
        with ops.recorded_kernels() as ran:
            y = ops.dropout(layout, 0.4, strided_seed)
        assert y.is_contiguous()
        assert torch.equal(y.view(6, 16), expected)
        assert [name for _, name in ran] == [runnable("dropout", device)[0]]
    assert torch.equal(ops.dropout(x[0, 0], 0.4, seed), expected[0])


def test_float64_takes_the_reference():
    x, seed = seeded((3, 5), seed=1).double(), torch.tensor(SEED)
    with ops.recorded_kernels() as ran:
        y = ops.dropout(x, 0.25, seed)
    torch.testing.assert_close(y, x / 0.75 * _philox.keep_mask(seed, 3, 5, 0.25))
    assert ran == [("dropout", "reference")]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_statistics(p, device):
    """As F.dropout's: the right share overall, per row and per column, and the mean is kept."""
    rows, columns = 1024, 1000
    x = torch.ones(rows, columns, device=device)
    y = ops.dropout(x, p)
    kept = (y != 0).double()
    p = _philox.threshold(p) / _philox.LEVELS
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * sigma / (rows * columns) ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 6 * sigma / rows**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 6 * sigma / columns**0.5
    neighbours = (kept[:, 1:] * kept[:, :-1]).mean().item()
    assert abs(neighbours - (1 - p) ** 2) < 0.003
    assert abs(y.double().mean().item() - 1.0) < 0.01
    assert not torch.equal(y, ops.dropout(x, p))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_the_bits_of_a_word_are_independent(p, device):
    """Any two of 32 columns that are drawn together, and any two groups, rows and offsets."""
    rows, groups, drop = 1 << 13, 8, _philox.threshold(p) / _philox.LEVELS
    kept = [
        _philox.keep_mask(torch.tensor([3, offset], device=device), rows, groups * 32, p).double()
        for offset in (1, 2)
    ]
    bits, other = ((k - (1 - drop)) / (drop * (1 - drop)) ** 0.5 for k in kept)
    words = bits.view(rows * groups, 32)
    bound = 5.5 * (rows * groups) ** -0.5  # 496 pairs below: 2e-5 that one of them is above
    assert (words.t() @ words / len(words)).fill_diagonal_(0.0).abs().max() < bound
    by_group = bits.view(rows, groups, 32).transpose(0, 1).reshape(groups, -1)
    bound = 5.5 * by_group.shape[1] ** -0.5
    assert (by_group @ by_group.t() / by_group.shape[1]).fill_diagonal_(0.0).abs().max() < bound
    assert (bits * bits.roll(1, 0)).mean().abs() < 5.5 * bits.numel() ** -0.5
    assert (bits * other).mean().abs() < 5.5 * bits.numel() ** -0.5


def test_masks_of_one_seed_are_nested(device):
    """What a lower p drops, a higher p drops too, whatever bits either draws."""
    seed = torch.tensor(SEED, device=device)
    probabilities = [0.0, 0.001, 0.02, 1 / 32, 0.1, 0.3, 0.5, 0.9, 0.98, 0.999, 1.0]
    masks = [_philox.keep_mask(seed, 64, 100, p) for p in probabilities]
    for lower, higher in itertools.pairwise(masks):
        assert not (higher & ~lower).any()


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.0, 0), (0.02, 1311), (1 / 32, 2048), (0.05, 13 * 256), (0.1, 26 * 256), (0.5, 1 << 15),
     (31 / 32, 31 << 11), (0.98, 64225), (0.999, 65470), (1.0, 1 << 16)],
)  # fmt: skip
def test_a_threshold_has_eight_bits_where_they_do(p, threshold):
    assert _philox.threshold(p) == threshold
    assert abs(threshold / _philox.LEVELS - p) <= max(min(p, 1 - p) / 16, 0.5 / _philox.LEVELS)


def test_the_seed_comes_from_the_devices_generator(device):
    x = torch.ones(8, 64, device=device)
    torch.manual_seed(3)
    first, second = ops.dropout(x, 0.5), ops.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(ops.dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_the_mask_does_not_depend_on_the_size(device):
    x, seed = torch.ones(6, 24, device=device), torch.tensor(SEED, device=device)
    whole = ops.dropout(x, 0.5, seed)
    assert torch.equal(ops.dropout(x[:2], 0.5, seed), whole[:2])
    assert torch.equal(ops.dropout(x[:, :13], 0.5, seed), whole[:, :13])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_has_the_same_mask(dtype, device):
    x = seeded((5, 21), seed=1, dtype=dtype, device=device).requires_grad_()
    dy = seeded((5, 21), seed=2, dtype=dtype, device=device)
    seed = torch.tensor(SEED, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.dropout(x, 0.3, seed)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.where(y.detach() == 0, 0.0, dy * _philox.keep_scale(0.3)))
    assert [t.data_ptr() for t in saved] == [seed.data_ptr()]


def test_checkpointing_draws_the_same_mask_again(device):
    x = seeded((4, 32), seed=1, device=device).requires_grad_()

    def layer(x):
        return ops.dropout(x, 0.5).sin()

    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)[0]
    assert torch.equal(plain, again)


@pytest.mark.gpu
def test_a_captured_graph_reads_the_seed_anew():
    x, seed = torch.ones(16, 64, device="cuda"), torch.tensor([1, 2], device="cuda")
    ops.dropout(x, 0.5, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.dropout(x, 0.5, seed)
    for value in ([1, 2], [5, 6], [1, 3]):
        seed.copy_(torch.tensor(value))
        graph.replay()
        assert torch.equal(y, ops.dropout(x, 0.5, seed))


@pytest.mark.gpu
def test_unaligned_pointers():
    seed = torch.tensor(SEED, device="cuda")
    for dtype in DTYPES:
        x = seeded((1 + 6 * 64,), seed=1, dtype=dtype, device="cuda")[1:].view(6, 64)
        assert torch.equal(ops.dropout(x, 0.5, seed), ops.dropout(x.clone(), 0.5, seed))


# --- hostile arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"p": 1.5}, ValueError, "dropout: p must be in [0, 1], got 1.5"),
        ({"p": float("nan")}, ValueError, "dropout: p must be in [0, 1], got nan"),
        (
            {"x": torch.ones(2, 3, dtype=torch.int32)},
            TypeError,
            "dropout: x must be float32, float16, bfloat16, float64, got int32",
        ),
        (
            {"x": torch.tensor(1.0)},
            ValueError,
            "dropout: x must have at least one dimension, got a scalar",
        ),
        (
            {"seed": torch.tensor([1, 2], dtype=torch.int32)},
            TypeError,
            "dropout: seed must be int64, got int32",
        ),
        (
            {"seed": torch.tensor([1])},
            ValueError,
            "dropout: seed must have shape [2], got [1]",
        ),
        (
            {"seed": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "dropout: seed is on meta, the input on cpu; move the module or the input to one device",
        ),
    ],
)
def test_error_texts(change, error, text):
    arguments = {"x": torch.ones(2, 3), "p": 0.5, "seed": torch.tensor(SEED), **change}
    with pytest.raises(error) as caught:
        ops.dropout(**arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": -1}, "dropout: rows must be from 0 to 2^32, got -1"),
        ({"columns": -1}, "dropout: columns must be from 0 to 2^35, got -1"),
        ({"threshold": 65537}, "dropout: threshold must be from 0 to 65536, got 65537"),
        ({"dtype": 7}, "dropout: dtype must be 0"),
        ({"x": 0}, "dropout: x is a null pointer"),
        ({"seed": 0}, "dropout: seed is a null pointer"),
        ({"variant": "dropout_none"}, 'dropout: this build has no variant "dropout_none"'),
    ],
)
def test_the_binding_refuses_what_would_corrupt_memory(change, text):
    x, seed = torch.ones(2, 3), torch.tensor(SEED)
    arguments = {
        "x": x.data_ptr(), "out": x.data_ptr(), "dtype": 0, "rows": 2, "columns": 3,
        "threshold": 6554, "seed": seed.data_ptr(), **_extension.launch_args(x), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(text)):
        _extension.C.dropout(**arguments)
    assert torch.equal(x, torch.ones(2, 3))
