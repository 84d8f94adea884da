# SPDX-License-Identifier: Apache-2.0
"""lora_linear: accuracy against float64, dropout, dtypes, memory and error texts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pyfast import ops
from pyfast.ops import _philox
from pyfast.testing import assert_accurate, seeded
from tests.cases import packed

F = torch.nn.functional


def composition(x, w, bias, a, b, scale, dy):
    """The plain layer with its gradients, by autograd."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * scale
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 3, 8, 64, 100])
@pytest.mark.parametrize("rows", [0, 1, 3, 127, 129])
def test_accuracy(rows, rank, dtype, device):
    n, k, scale = 72, 130, 2.0
    x = seeded((rows, k), seed=1, dtype=dtype, device=device)
    w = seeded((n, k), seed=2, dtype=dtype, device=device, scale=k**-0.5)
    bias = seeded((n,), seed=3, dtype=dtype, device=device)
    a = seeded((rank, k), seed=4, dtype=dtype, device=device, scale=k**-0.5)
    b = seeded((n, rank), seed=5, dtype=dtype, device=device, scale=rank**-0.5)
    dy = seeded((rows, n), seed=6, dtype=dtype, device=device)
    exact = composition(*(t.double() for t in (x, w, bias, a, b)), scale, dy.double())
    plain = composition(x, w, bias, a, b, scale, dy)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = ops.lora_linear(leaves[0], w, leaves[1], leaves[2], scale=scale, bias=bias)
    y.backward(dy)
    got = {"y": y.detach(), "dx": leaves[0].grad, "da": leaves[1].grad, "db": leaves[2].grad}
    for name, value in got.items():
        assert value.dtype == dtype
        assert_accurate(value, plain[name], exact[name], what=name)


@pytest.mark.parametrize("nested", [False, True])
def test_an_nf4_base_is_its_dequantised_matrix(nested, device):
    n, k = 40, 96
    codes, absmax, inner, offset = packed(n, k, device, nested=nested)
    scales = {"nested_absmax": inner, "nested_offset": offset}
    w = ops.nf4_dequantize(codes, absmax, (n, k), torch.float32, **scales)
    x = seeded((7, k), seed=1, device=device).requires_grad_()
    a, b = seeded((4, k), seed=2, device=device), seeded((n, 4), seed=3, device=device)
    y = ops.lora_linear(x, codes, a, b, scale=0.5, absmax=absmax, **scales)
    expected = F.linear(x, w) + F.linear(F.linear(x, a), b) * 0.5
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


# Known answers of philox4x32 published with Random123: rounds, counter, key, words.
ONES, PI = (0xFFFFFFFF,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
PHILOX = [
    (7, (0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, ONES[:2], (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, ONES[:2], (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox_words(counter, key, rounds=7):
    """An independent philox4x32 in Python integers."""
    (c0, c1, c2, c3), (k0, k1), low = counter, key, 0xFFFFFFFF
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), PHILOX)
def test_the_oracle_knows_the_published_vectors(rounds, counter, key, words):
    assert philox_words(counter, key, rounds) == words


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.0, 0), (0.01, 655), (1 / 32, 2048), (0.1, 26 * 256), (0.5, 1 << 15), (0.75, 3 << 14),
     (0.97, 63570), (0.999, 65470), (1.0, 1 << 16)],
)  # fmt: skip
def test_the_mask_is_philox_by_row_and_column(p, threshold, device):
    seed = torch.tensor([0x0123456789ABCDEF, 0x1122334455667788], device=device)
    rows, columns = 5, 75
    keep = _philox.keep_mask(seed, rows, columns, p).cpu()
    key = (0x89ABCDEF, 0x01234567)
    for row, group in itertools.product(range(rows), range(3)):
        words = [
            word
            for call in range(4)
            for word in philox_words((row, 4 * group + call, 0x55667788, 0x11223344), key)
        ]
        for column in range(32 * group, min(columns, 32 * group + 32)):
            number = sum((word >> column % 32 & 1) << j for j, word in enumerate(words))
            assert bool(keep[row, column]) == (number >= threshold)


def test_mask_statistics(device):
    seed = torch.tensor([1, 2], device=device)
    p = 26 / 256
    keep = _philox.keep_mask(seed, 512, 1024, p).double()
    variance = p * (1 - p)
    assert abs(keep.mean().item() - (1 - p)) < 4 * (variance / keep.numel()) ** 0.5
    columns = keep.mean(0)
    assert (columns - (1 - p)).abs().max() < 6 * (variance / 512) ** 0.5
    other = _philox.keep_mask(torch.tensor([1, 3], device=device), 512, 1024, p).double()
    overlap = (keep * other).mean().item()
    assert abs(overlap - (1 - p) ** 2) < 0.002


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_reaches_every_gradient_with_one_mask(p, device):
    n, k, r = 12, 40, 5
    x = seeded((33, k), seed=1, device=device).requires_grad_()
    w = seeded((n, k), seed=2, device=device)
    a, b = (seeded(s, seed=3, device=device).requires_grad_() for s in ((r, k), (n, r)))
    torch.manual_seed(7)
    seed = _philox.new_seed(x.device)
    keep = _philox.keep_mask(seed, 33, k, p)
    torch.manual_seed(7)
    y = ops.lora_linear(x, w, a, b, scale=1.5, dropout=p)
    dropped = torch.where(keep, x * _philox.keep_scale(p), 0.0)
    expected = F.linear(x, w) + 1.5 * F.linear(F.linear(dropped, a), b)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, a, b), dy)
    want = torch.autograd.grad(expected, (x, a, b), dy)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(reentrant, device):
    x = seeded((9, 24), seed=1, device=device)
    w = seeded((8, 24), seed=2, device=device)

    def grads(run):
        leaves = [seeded(s, seed=3, device=device).requires_grad_() for s in ((4, 24), (8, 4))]
        torch.manual_seed(5)
        inner = x.clone().requires_grad_()
        run(
            lambda x: ops.lora_linear(x, w, *leaves, scale=1.0, dropout=0.4), inner
        ).sum().backward()
        return [inner.grad, *(leaf.grad for leaf in leaves)]

    plain = grads(lambda layer, x: layer(x))
    again = grads(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_is_saved_for_backward(device):
    m, n, k, r = 64, 48, 96, 8
    x = seeded((m, k), seed=1, device=device).requires_grad_()
    w = seeded((n, k), seed=2, device=device)
    a, b = (seeded(s, seed=3, device=device).requires_grad_() for s in ((r, k), (n, r)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(x, w, a, b, scale=1.0, dropout=0.1)
    known = {t.data_ptr() for t in (x, w, a, b)}
    fresh = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in fresh) == m * r * 4 + 16


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_autocast_and_mixed_dtypes_follow_linear(base, adapter, device):
    x = seeded((3, 16), seed=1, dtype=base, device=device).requires_grad_()
    w = seeded((8, 16), seed=2, dtype=base, device=device)
    a, b = (
        seeded(s, seed=3, dtype=adapter, device=device).requires_grad_() for s in ((2, 16), (8, 2))
    )
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = ops.lora_linear(x, w, a, b, scale=1.0)
            assert y.dtype == F.linear(x, w).dtype
        grads = torch.autograd.grad(y.float().sum(), (x, a, b))
        assert [g.dtype for g in grads] == [base, adapter, adapter]


def test_a_trainable_base_weight_gets_its_gradient(device):
    x, w, a, b = (
        seeded(s, seed=i, device=device).requires_grad_()
        for i, s in enumerate([(6, 16), (8, 16), (2, 16), (8, 2)])
    )
    y = ops.lora_linear(x, w, a, b, scale=0.5)
    expected = F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b)
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), (x, w, a, b)),
        torch.autograd.grad(expected.square().sum(), (x, w, a, b)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": (3, 15)}, ValueError, "lora_linear: lora_A must have shape [3, 16], got [3, 15]"),
        ({"b": (8, 4)}, ValueError, "lora_linear: lora_B must have shape [8, 3], got [8, 4]"),
        ({"w": (9, 16)}, ValueError, "lora_linear: weight must have shape [8, 16], got [9, 16]"),
        ({"bias": (9,)}, ValueError, "lora_linear: bias must have shape [8], got [9]"),
        ({"dropout": 1.5}, ValueError, "lora_linear: dropout must be in [0, 1], got 1.5"),
    ],
)
def test_error_texts(change, error, text):
    shapes = {"x": (2, 16), "w": (8, 16), "a": (3, 16), "b": (8, 3), "bias": (8,)}
    dropout = change.get("dropout", 0.0)
    shapes.update({k: v for k, v in change.items() if k != "dropout"})
    t = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(error) as caught:
        ops.lora_linear(t["x"], t["w"], t["a"], t["b"], scale=1.0, bias=t["bias"], dropout=dropout)
    assert str(caught.value) == text


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"absmax": torch.ones(1)}, "lora_linear: absmax has 1 values, 2 are needed for 128"),
        ({"weight": torch.zeros(7, 1, dtype=torch.uint8)}, "lora_linear: packed has 7 values, 64"),
        ({"nested_absmax": torch.ones(1)}, "lora_linear: nested_absmax and offset go together"),
        ({"blocksize": 48}, "lora_linear: blocksize must be one of"),
    ],
)
def test_malformed_nf4_parts_are_named_before_anything_runs(change, text, compiled):
    codes, absmax, _, _ = packed(8, 16, "cpu")
    x, a, b = torch.zeros(2, 16), torch.zeros(3, 16), torch.zeros(8, 3)
    parts = {"weight": codes, "absmax": absmax, **change}

    def call(x):
        return ops.lora_linear(x, a=a, b=b, scale=1.0, **parts)

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="eager")
    with ops.recorded_kernels() as ran, pytest.raises(Exception, match=text) as caught:
        call(x)
    assert compiled or isinstance(caught.value, ValueError)
    assert [name for op, name in ran if op != "lora_linear"] == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (torch.bfloat16, "x is float32 and weight bfloat16. Fix: cast x to bfloat16, or call the model "
         "under torch.autocast"),
        (torch.float64, "x is float32 and weight float64. Fix: cast x to float64"),
        (torch.uint8, "weight must be float32, got uint8"),
    ],
)  # fmt: skip
def test_a_weight_of_another_dtype_is_refused(dtype, text, dropout, device):
    x, w = torch.zeros(2, 16, device=device), torch.zeros(8, 16, dtype=dtype, device=device)
    a, b = torch.zeros(3, 16, device=device), torch.zeros(8, 3, device=device)
    state = torch.get_rng_state()
    with pytest.raises(TypeError) as caught:
        ops.lora_linear(x, w, a, b, scale=1.0, dropout=dropout)
    assert str(caught.value) == f"lora_linear: {text}"
    assert torch.equal(torch.get_rng_state(), state)
    if dtype is torch.bfloat16:
        with torch.autocast(device, dtype):
            assert ops.lora_linear(x, w, a, b, scale=1.0, dropout=dropout).dtype is dtype
        ops.lora_linear(x.to(dtype), w, a, b, scale=1.0, dropout=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_integer_x_is_named(dropout):
    x, a, b = torch.ones(6, 16, dtype=torch.int64), torch.randn(3, 16), torch.randn(8, 3)
    with pytest.raises(TypeError, match=r"lora_linear: x must be float32, .* got int64"):
        ops.lora_linear(x, torch.randn(8, 16), a, b, scale=1.0, dropout=dropout)
