# SPDX-License-Identifier: Apache-2.0
"""The few-row kernels: which one runs, and how near it is to float64."""

from __future__ import annotations

import pytest
import torch

from pyfast import _extension, ops
from pyfast.testing import seeded
from tests.cases import packed

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128, 129, 192, 193, 255, 256)
# Ragged N, K that is no multiple of a chunk of 256 or less than one, several passes over bands of rows,
# one or two tiles for clusters that split K.
SHAPES = [(1000, 512), (9001, 1088), (40003, 320), (3000, 4096), (17000, 64), (6000, 4096), (5, 64)]
HALVES = (torch.bfloat16, torch.float16)
SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def expected_kernel(m, n):
    """For up to 4096 in features."""
    if m <= 16:
        return f"nf4_few_rows_mma_{'sm90' if SM90 else 'sm80'}"
    sm_count = torch.cuda.get_device_properties("cuda").multi_processor_count
    served = SM90 and n > (0 if m <= 64 else 2 if m <= 128 else 13) * sm_count
    return "nf4_few_rows_wgmma_sm90" if served else "nf4_linear_scratch"


def linear(x, parts, n, bias=None):
    """nf4_linear and the name of the kernel that served it."""
    codes, absmax, inner, offset = parts
    with ops.recorded_kernels() as ran:
        y = ops.nf4_linear(
            x, codes, absmax, bias, out_features=n, nested_absmax=inner, nested_offset=offset
        )
    return y, dict(ran)["nf4_linear"]


def dense(parts, n, k, dtype):
    codes, absmax, inner, offset = parts
    scales = {"nested_absmax": inner, "nested_offset": offset}
    return ops.nf4_dequantize(codes, absmax, (n, k), dtype, **scales)


def rms(value, exact):
    return ((value.double() - exact).square().mean() / exact.square().mean()).sqrt()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_float64_than_bitsandbytes(shape, dtype, nested):
    n, k = shape
    parts = packed(n, k, "cuda", nested=nested)
    exact_w = dense(parts, n, k, torch.float32).double()
    rounded_w = dense(parts, n, k, dtype).double()
    for m in ROWS:
        # A row pitch of its own.
        x = seeded((m, k + 64), seed=m, dtype=dtype, device="cuda")[:, :k]
        bias = seeded((n,), seed=3, dtype=dtype, device="cuda") if m % 2 else None
        y, kernel = linear(x, parts, n, bias)
        assert kernel == expected_kernel(m, n)
        added = 0.0 if bias is None else bias.double()
        exact = x.double() @ exact_w.T + added
        # bitsandbytes at its best: a float32 product of its dequantised weights, rounded once.
        best = (x.double() @ rounded_w.T + added).to(dtype)
        # A handful of values: single roundings decide.
        few = 2.0 if m * n < 100 else 1.2 if m * n < 10_000 else 1.01
        assert rms(y, exact) <= few * rms(best, exact), m
        assert torch.equal(y, linear(x, parts, n, bias)[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1000, 512), (9001, 1088), (20000, 320)])
def test_one_hot_rows_give_the_weights_within_one_rounding(shape, dtype, nested):
    n, k = shape
    parts = packed(n, k, "cuda", nested=nested)
    weights = dense(parts, n, k, dtype)
    for m in ROWS:
        hot = (torch.arange(m, device="cuda") * 997 + m) % k
        x = torch.zeros((m, k), dtype=dtype, device="cuda")
        x[torch.arange(m, device="cuda"), hot] = 1
        y, kernel = linear(x, parts, n)
        assert kernel == expected_kernel(m, n)
        # Neighbours among the numbers of a 2-byte type differ by one as integers.
        steps = (y.view(torch.int16).int() - weights[:, hot].T.view(torch.int16).int()).abs()
        assert steps.max() <= 1, m


@pytest.mark.parametrize("m", [1, 12, 40, 100, 200])
def test_hostile_scales_and_inputs(m):
    """A NaN scale spoils its own out feature, an infinite x its own row."""
    n, k = 9000, 512
    codes, absmax, inner, offset = packed(n, k, "cuda")
    absmax[7 * k // 64] = float("nan")
    x = seeded((m, k), seed=1, dtype=torch.bfloat16, device="cuda")
    x[m // 2, 3] = float("inf")
    y, _ = linear(x, (codes, absmax, inner, offset), n)
    finite = torch.isfinite(y)
    spoilt = torch.zeros_like(finite)
    spoilt[:, 7] = True
    spoilt[m // 2] = True
    assert finite[~spoilt].all()
    assert not finite[:, 7].any()


@pytest.mark.parametrize("m", [1, 16, 64, 256])
def test_on_a_side_stream_and_in_a_graph(m):
    n, k = 9000, 1024
    parts = packed(n, k, "cuda", nested=True)
    x = seeded((m, k), seed=1, dtype=torch.bfloat16, device="cuda")
    later = seeded((m, k), seed=2, dtype=torch.bfloat16, device="cuda")
    expected, expected_later = linear(x, parts, n)[0], linear(later, parts, n)[0]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        held = torch.zeros_like(x)
        torch.cuda._sleep(2_000_000)
        held.copy_(x)
        got = linear(held, parts, n)[0]
        stream.synchronize()
        assert torch.equal(got, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # The second product reads what an early launch must wait for.
            copied = held + 0
            first = linear(copied, parts, n)[0]
            second = linear(copied, parts, n)[0]
        held.copy_(later)
        graph.replay()
        stream.synchronize()
    assert torch.equal(first, expected_later)
    assert torch.equal(second, expected_later)


@pytest.mark.parametrize("n", [5, 1000, 4099])
@pytest.mark.parametrize(
    ("variant", "m"),
    [("mma_sm80", 1), ("mma_sm80", 16), ("wgmma_sm90", 1), ("wgmma_sm90", 64), ("wgmma_sm90", 99),
     ("wgmma_sm90", 180), ("wgmma_sm90", 256)],
)  # fmt: skip
def test_kernels_that_other_shapes_are_served_by(variant, m, n):
    if variant.endswith("sm90") and not SM90:
        pytest.skip("needs compute capability 9.0")
    k = 1088
    codes, absmax, inner, offset = packed(n, k, "cuda", nested=True)
    x = seeded((m, k), seed=1, dtype=torch.bfloat16, device="cuda")
    y = torch.full((m, n), float("nan"), dtype=x.dtype, device="cuda")
    name = _extension.C.nf4_few_rows(
        x=x.data_ptr(), pitch_x=k, packed=codes.data_ptr(), absmax=absmax.data_ptr(),
        nested_absmax=inner.data_ptr(), offset=offset.data_ptr(), bias=0, y=y.data_ptr(),
        pitch_y=n, m=m, n=n, k=k, dtype=_extension.DTYPES[x.dtype], blocksize=64, early=False,
        variant=f"nf4_few_rows_{variant}", **_extension.launch_args(x),
    )  # fmt: skip
    assert name == f"nf4_few_rows_{variant}"
    exact = x.double() @ dense((codes, absmax, inner, offset), n, k, torch.float32).double().T
    assert rms(y, exact) < 4e-3


def test_what_the_extension_refuses():
    codes, absmax, _, _ = packed(64, 128, "cuda")
    x = seeded((1, 128), seed=1, dtype=torch.bfloat16, device="cuda")
    y = torch.empty((1, 64), dtype=x.dtype, device="cuda")
    served = {
        "x": x.data_ptr(), "pitch_x": 128, "packed": codes.data_ptr(), "absmax": absmax.data_ptr(),
        "nested_absmax": 0, "offset": 0, "bias": 0, "y": y.data_ptr(), "pitch_y": 64, "m": 1,
        "n": 64, "k": 128, "dtype": 2, "blocksize": 64, "early": True, **_extension.launch_args(x),
    }  # fmt: skip
    for changes, sentence in (
        ({"m": 257}, "it takes up to"),
        ({"blocksize": 128}, "blocksize must be 64, got 128"),
        ({"k": 96}, "k must be a multiple of 64, got 96"),
        ({"dtype": 0}, "dtype must be"),
        ({"packed": codes.data_ptr() + 1}, "multiples of 16 bytes"),
        ({"device": -1}, "it runs on cuda"),
        ({"variant": "other"}, "no variant"),
    ):
        with pytest.raises(ValueError, match=sentence):
            _extension.C.nf4_few_rows(**(served | changes))


def test_shapes_strides_and_gradients():
    """Leading dimensions, a transposed x, and a forward whose backward dequantises."""
    n, k = 96, 192
    parts = packed(n, k, "cuda", nested=True)
    weights = dense(parts, n, k, torch.bfloat16)
    x = seeded((k, 6), seed=1, dtype=torch.bfloat16, device="cuda").T.view(2, 3, k)
    x = x.detach().requires_grad_()
    y, kernel = linear(x, parts, n)
    assert kernel == expected_kernel(6, n)
    assert y.shape == (2, 3, n)
    assert rms(y, x.double() @ dense(parts, n, k, torch.float32).double().T) < 4e-3
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(y) @ weights, rtol=2e-2, atol=2e-2)
