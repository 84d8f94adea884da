# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the LoRA linear: which one runs, and how near it is to float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import _extension, ops
from pyfast.ops import _library, _philox
from pyfast.testing import seeded
from tests.cases import packed

pytestmark = pytest.mark.gpu

HALVES = (torch.bfloat16, torch.float16)
SHAPES = [
    (256, 512, 768),
    (1, 64, 64),
    (130, 1024, 1032),
    (513, 136, 8),
    (1000, 4104, 520),
    (1100, 1032, 4104),
]
RANKS = (1, 3, 8, 16, 24, 33, 64, 100, 128, 200, 256)
SCALE = 0.75
SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def operands(m, k, n, r, dtype, adapter_dtype, by_out):
    """x, W, A, B and dy; W is [N, K], a transposed view where it is stored by in feature."""
    x = seeded((m, k), seed=1, dtype=dtype, device="cuda").requires_grad_()
    shape = (n, k) if by_out else (k, n)
    w = seeded(shape, seed=2, dtype=dtype, device="cuda", scale=k**-0.5)
    a = seeded((r, k), seed=3, dtype=adapter_dtype, device="cuda", scale=k**-0.5).requires_grad_()
    b = seeded((n, r), seed=4, dtype=adapter_dtype, device="cuda", scale=r**-0.5).requires_grad_()
    dy = seeded((m, n), seed=5, dtype=dtype, device="cuda")
    return x, w if by_out else w.t(), a, b, dy


def exact(x, w, a, b, dy, mask=1.0):
    """y, dx, dA and dB in float64."""
    x, w, a, b, dy = (t.detach().double() for t in (x, w, a, b, dy))
    dropped = x * mask
    z = SCALE * dropped @ a.t()
    dz = SCALE * dy @ b
    return x @ w.t() + z @ b.t(), dy @ w + dz @ a * mask, dz.t() @ dropped, dy.t() @ z


def composed(x, w, a, b, dy, mask=1.0):
    """The same by torch in x's dtype."""
    x, a, b = (t.detach().to(x.dtype).requires_grad_() for t in (x, a, b))
    linear = torch.nn.functional.linear
    y = linear(x, w) + SCALE * linear(linear(x * mask, a), b)
    y.backward(dy)
    return y.detach(), x.grad, a.grad, b.grad


def check(got, expected, plain):
    """No worse than the plain composition: root mean square by 1.1, maximum by 2 (few values: 3 and 4)."""
    for name, g, e, p in zip(("y", "dx", "dA", "dB"), got, expected, plain, strict=True):
        ours, theirs = (g.double() - e).abs(), (p.double() - e).abs()
        rounding = e.abs().max() * 1e-6
        # Few rows or ranks: a handful of roundings decide, so only their size is held.
        many = e.numel() >= 10_000
        mean, most = (1.1, 2.0) if many else (3.0, 4.0)
        assert ours.square().mean().sqrt() <= mean * theirs.square().mean().sqrt() + rounding, name
        assert ours.max() <= most * theirs.max() + rounding, name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_is_as_near_to_float64_as_torch(shape, rank, dtype):
    for adapter_dtype, by_out in itertools.product((dtype, torch.float32), (True, False)):
        x, w, a, b, dy = operands(*shape, rank, dtype, adapter_dtype, by_out)
        ops.lora_linear(x, w, a, b, scale=SCALE).backward(dy)
        got = ops.lora_linear(x, w, a, b, scale=SCALE).detach(), x.grad, a.grad, b.grad
        assert a.grad.dtype == b.grad.dtype == adapter_dtype
        check(got, exact(x, w, a, b, dy), composed(x, w, a, b, dy))


MAKING = {16: "gemm_sm90_128x256_cooperative_2x1_making_16"}
MAKING |= {128: MAKING[16].replace("16", "128")}
# Ragged; of the eight columns of tiles that are taken at a time, a few beyond the end; and, for dx of
# the fourth, a second GEMM for the ninth column.
WIDE_SHAPES = [
    (1100, 4088, 4104),
    (1003, 2056, 4088),
    (1100, 2048, 17000),
    (4096, 2304, 4096),
    (2047, 4096, 4096),
]


RANKED_SHAPES = [
    *itertools.product(WIDE_SHAPES, (1, 16, 17, 64)),
    *itertools.product([(1100, 8192, 8192), (300, 8192, 12288)], (64, 100, 128)),
]


@pytest.mark.skipif(not SM90, reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "rank"), RANKED_SHAPES, ids=str)
def test_gemms_that_make_their_low_rank_operand(shape, rank, dtype):
    for adapter_dtype, by_out in ((dtype, True), (torch.float32, True), (dtype, False)):
        x, w, a, b, dy = operands(*shape, rank, dtype, adapter_dtype, by_out)
        with ops.recorded_kernels() as ran:
            y = ops.lora_linear(x, w, a, b, scale=SCALE)
            y.backward(dy)
        assert {name for _, name in ran} == {MAKING[16 if rank <= 16 else 128]}
        expected, plain = exact(x, w, a, b, dy), composed(x, w, a, b, dy)
        check((y.detach(), x.grad, a.grad, b.grad), expected, plain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rank", "p"),
    [
        (3, 0.25),
        (16, 0.25),
        (16, 0.02),
        (33, 0.25),
        (33, 0.02),
        (128, 0.02),
        (128, 1.0),
        (200, 0.25),
    ],
)
def test_dropout_draws_one_mask_in_all_kernels(shape, rank, p, dtype, monkeypatch):
    m, k, _ = shape
    seed = torch.tensor([5, 9 << 33], device="cuda")
    monkeypatch.setattr(_philox, "new_seed", lambda device: seed)
    mask = (_philox.keep_mask(seed, m, k, p) * _philox.keep_scale(p)).double()
    x, w, a, b, dy = operands(*shape, rank, dtype, dtype, True)
    y = ops.lora_linear(x, w, a, b, scale=SCALE, dropout=p)
    y.backward(dy)
    expected = exact(x, w, a, b, dy, mask)
    check((y.detach(), x.grad, a.grad, b.grad), expected, composed(x, w, a, b, dy, mask.to(dtype)))


@pytest.mark.skipif(not SM90, reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [shape for shape in WIDE_SHAPES if shape[1] != 2304], ids=str)
@pytest.mark.parametrize(("rank", "p"), [(1, 0.5), (9, 0.9), (16, 0.1), (16, 0.02), (16, 1.0)])
def test_gemms_that_make_their_low_rank_operand_with_dropout(shape, rank, p, dtype, monkeypatch):
    m, k, _ = shape
    seed = torch.tensor([-7, 3 << 35], device="cuda")
    monkeypatch.setattr(_philox, "new_seed", lambda device: seed)
    mask = (_philox.keep_mask(seed, m, k, p) * _philox.keep_scale(p)).double()
    for adapter_dtype in (dtype, torch.float32):
        x, w, a, b, dy = operands(*shape, rank, dtype, adapter_dtype, True)
        with ops.recorded_kernels() as ran:
            y = ops.lora_linear(x, w, a, b, scale=SCALE, dropout=p)
            y.backward(dy)
        assert {name for _, name in ran if name != "dropout_cuda"} == {f"{MAKING[16]}_masked"}
        expected = exact(x, w, a, b, dy, mask)
        plain = composed(x, w, a, b, dy, mask.to(dtype))
        check((y.detach(), x.grad, a.grad, b.grad), expected, plain)


@pytest.mark.skipif(not SM90, reason="needs compute capability 9.0")
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_kernels_that_serve(nf4, rank):
    m, k, n, r = 2048, 4096, 4096, rank
    x, w, a, b, dy = operands(m, k, n, r, torch.bfloat16, torch.float32, True)
    parts = {}
    if nf4:
        w, absmax, inner, offset = packed(n, k, "cuda", nested=True)
        parts = {"absmax": absmax, "nested_absmax": inner, "nested_offset": offset}
    with ops.recorded_kernels() as ran:
        ops.lora_linear(x, w, a, b, scale=SCALE, **parts).backward(dy)
    served = [(op, name) for op, name in ran if op.startswith("lora")]
    names = _extension.C.lora_gemm_kernels()
    assert [op for op, _ in served] == ["lora_linear", "lora_linear_backward"]
    assert all(name in names for _, name in served), served
    decoded = [name for op, name in ran if op == "nf4_dequantize"]
    assert decoded == ["nf4_dequantize_cuda"] * (2 if nf4 else 0)


def test_small_products_go_through_torch():
    x, w, a, b, dy = operands(16, 1024, 1024, 8, torch.bfloat16, torch.bfloat16, True)
    with ops.recorded_kernels() as ran:
        ops.lora_linear(x, w, a, b, scale=SCALE).backward(dy)
    names = [name for _, name in ran]
    why = "torch's GEMM is faster for 16 rows, 1024 to 1024 features" if SM90 else ""
    assert len(names) == 2
    assert all(name.startswith(f"lora_linear_skinny ({why}") for name in names), names


@pytest.mark.parametrize(
    ("k", "n", "dtype"), [(60, 64, HALVES[0]), (64, 60, HALVES[0]), (64, 64, torch.float32)]
)
def test_what_no_kernel_takes_is_said_once(k, n, dtype):
    x, w, a, b, dy = operands(16, k, n, 8, dtype, dtype, True)

    def two_steps():
        for _ in range(2):
            ops.lora_linear(x, w, a, b, scale=SCALE).backward(dy)

    _library._warned.clear()
    with ops.recorded_kernels() as ran, pytest.warns(UserWarning, match="torch reference") as said:
        two_steps()
    assert {name for _, name in ran} == {"reference"}
    assert len([one for one in said if "lora_linear runs" in str(one.message)]) == 1


@pytest.mark.parametrize("rank", [16, 64, 200])
def test_repeated_runs_are_bit_identical(rank):
    x, w, a, b, dy = operands(4096, 2048, 2048, rank, torch.bfloat16, torch.float32, True)
    first = None
    for _ in range(8):
        x.grad = a.grad = b.grad = None
        y = ops.lora_linear(x, w, a, b, scale=SCALE, dropout=0.0)
        y.backward(dy)
        results = [y.detach(), x.grad, a.grad, b.grad]
        first = first or results
        assert all(torch.equal(p, q) for p, q in zip(first, results, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rank", [8, 16, 64, 200])
@pytest.mark.parametrize(
    "shape", [(300, 256, 512), (1100, 2048, 2048), (1100, 1032, 4104)], ids=str
)
def test_only_the_wanted_gradients_are_made(shape, rank, p):
    """What none of them reads (x, z, the seed) is not kept, and the kernels get no pointer to it."""
    torch.manual_seed(3)
    keep = _philox.keep_mask(_philox.new_seed(torch.device("cuda")), shape[0], shape[1], p)
    mask = keep * _philox.keep_scale(p)
    for wanted in itertools.product((False, True), repeat=3):
        x, w, a, b, dy = operands(*shape, rank, torch.bfloat16, torch.bfloat16, True)
        for tensor, want in zip((x, a, b), wanted, strict=True):
            tensor.requires_grad_(want)
        torch.manual_seed(3)
        y = ops.lora_linear(x, w, a, b, scale=SCALE, dropout=p)
        if any(wanted):
            y.backward(dy)
        expected = exact(x, w, a, b, dy, mask)[1:]
        for tensor, want, e in zip((x, a, b), wanted, expected, strict=True):
            assert (tensor.grad is not None) == want
            if want:
                assert (tensor.grad.double() - e).norm() < 0.01 * e.norm()


@pytest.mark.parametrize("shape", [(1024, 512, 768), (4096, 2048, 4096)], ids=str)
def test_streams_share_nothing_and_never_wait_for_each_other(shape):
    cases = [operands(*shape, 16, torch.bfloat16, torch.float32, True) for _ in range(3)]
    expected = exact(*cases[0])
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1, -2)]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (x, w, a, b, dy) in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                x.grad = a.grad = b.grad = None
                ops.lora_linear(x, w, a, b, scale=SCALE).backward(dy)
    torch.cuda.synchronize()
    for x, _, a, b, _ in cases:
        for tensor, e in zip((x, a, b), expected[1:], strict=True):
            assert (tensor.grad.double() - e).norm() < 0.01 * e.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 7, 16, 33, 200, 256])
def test_few_rows_of_an_nf4_weight_are_multiplied_from_its_bytes(m, dtype):
    k, n, r = 1088, 9000 if m > 16 else 1032, 16
    x, w, a, b, dy = operands(m, k, n, r, dtype, torch.float32, True)
    for nested in (False, True):
        codes, absmax, inner, offset = packed(n, k, "cuda", nested=nested)
        parts = {"nested_absmax": inner, "nested_offset": offset}
        w = ops.nf4_dequantize(codes, absmax, (n, k), dtype, **parts)
        bias = seeded((n,), seed=6, dtype=dtype, device="cuda")
        with ops.recorded_kernels() as ran:
            y = ops.lora_linear(x, codes, a, b, scale=SCALE, bias=bias, absmax=absmax, **parts)
            y.backward(dy)
        assert [op for op, _ in ran] == [
            "nf4_linear",
            "lora_linear",
            "nf4_dequantize",
            "lora_linear_backward",
        ]
        assert "few_rows" in ran[0][1]
        assert ran[1][1].endswith("(few rows of an NF4 weight)")
        y = y.detach() - bias.double()
        expected, plain = exact(x, w, a, b, dy), composed(x, w, a, b, dy)
        # The bias is rounded with the sum, so y is held by twice the plain composition's error.
        assert (y - expected[0]).norm() <= 2 * (
            plain[0].double() - expected[0]
        ).norm() + 1e-3 * y.norm()
        check((expected[0], x.grad, a.grad, b.grad), expected, plain)
        x.grad = a.grad = b.grad = None
