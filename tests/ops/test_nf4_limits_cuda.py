# SPDX-License-Identifier: Apache-2.0
"""NF4 weights of more than 2^31 elements, and weights on another device than the current one."""

from __future__ import annotations

import pytest
import torch

from pyfast import _extension, ops
from pyfast.nn import NF4Tensor, NF4Weight
from pyfast.nn.experts import _expert
from pyfast.ops._nf4_format import NEST_MAP, NF4_CODE
from pyfast.testing import seeded
from tests.cases import packed
from tests.ops.test_nf4_few_rows_cuda import SM90, expected_kernel, linear, rms

pytestmark = pytest.mark.gpu

N, K = 128256, 16896  # 2,167,013,376 weights
NEEDED = 7 << 30  # bytes: codes 1.0 GiB, weights in two bytes 4.0 GiB, slices and workspaces
SAMPLE = 512
# Rows in front, around element 2^31, and at the end.
SLICES = [slice(at, at + SAMPLE) for at in (0, (1 << 31) // K - SAMPLE // 2, N - SAMPLE)]


def kernel_name(m):
    many = "nf4_gemm_sm90_narrow" if SM90 else "nf4_linear_scratch"
    return expected_kernel(m, N) if m <= 256 else many


@pytest.fixture(scope="module", params=[False, True], ids=["flat", "nested"])
def parts(request):
    """Random codes and scales: the floats that they could come from would need twice the memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < NEEDED:
        pytest.skip(
            f"needs {NEEDED / 2**30:.0f} GiB of GPU memory, {free / 2**30:.1f} GiB are free"
        )
    made = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(0)}
    codes = torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, **made)
    blocks = N * K // 64
    if request.param:
        scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, **made)
        inner = torch.rand(-(-blocks // 256), **made)
        yield codes, scales, inner, torch.tensor(1.5, device="cuda")
    else:
        yield codes, torch.rand(blocks, **made) + 0.5, None, None


def rows_of(parts, rows, dtype=torch.float32):
    """Rows of the weight, by torch alone and from bytes and scales that were cut out first."""
    codes, absmax, inner, offset = parts
    first, last = rows.start * K // 64, rows.stop * K // 64
    scales = absmax[first:last]
    if inner is not None:
        groups = inner[torch.arange(first, last, device=codes.device) // 256]
        scales = NEST_MAP.to(codes.device)[scales.int()] * groups + offset
    cut = codes.view(-1)[rows.start * (K // 2) : rows.stop * (K // 2)]
    values = NF4_CODE.to(codes.device)[torch.stack([cut >> 4, cut & 15], 1).int()]
    return (values.view(-1, 64) * scales[:, None]).view(-1, K).to(dtype)


def dequantize(parts, shape, dtype):
    codes, absmax, inner, offset = parts
    scales = {"nested_absmax": inner, "nested_offset": offset}
    return ops.nf4_dequantize(codes, absmax, shape, dtype, **scales)


# --- more than 2^31 elements ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize(parts, dtype):
    whole = dequantize(parts, (N, K), dtype)
    for rows in SLICES:
        assert torch.equal(whole[rows], rows_of(parts, rows, dtype))


def test_quantize(parts):
    """Blocks have no neighbours, so that rows quantised by themselves are the oracle."""
    whole = dequantize(parts, (N, K), torch.bfloat16)
    codes, absmax = ops.nf4_quantize(whole, 64)
    for rows in SLICES:
        some, scales = ops.nf4_quantize(whole[rows].clone(), 64)
        assert torch.equal(codes[rows.start * (K // 2) : rows.stop * (K // 2)], some)
        assert torch.equal(absmax[rows.start * (K // 64) : rows.stop * (K // 64)], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 128, 256, 300])
def test_products(parts, m, dtype):
    """One-hot rows give the weights: exactly from a scratch, within one rounding from few rows."""
    hot = (torch.arange(m, device="cuda") * 997 + K - m) % K
    x = torch.zeros((m, K), dtype=dtype, device="cuda")
    x[torch.arange(m, device="cuda"), hot] = 1
    y, kernel = linear(x, parts, N)
    assert kernel == kernel_name(m)
    z, _ = linear(seeded((m, K), seed=m, dtype=dtype, device="cuda"), parts, N)
    dense = seeded((m, K), seed=m, dtype=dtype, device="cuda").double()
    for rows in SLICES:
        weights = rows_of(parts, rows, dtype)
        steps = y[:, rows].contiguous().view(torch.int16).int()
        steps = (steps - weights[:, hot].T.contiguous().view(torch.int16).int()).abs()
        assert steps.max() <= (1 if m <= 256 else 0)
        assert rms(z[:, rows], dense @ weights.double().T) < 4e-3


def test_the_kernel_of_other_gpus(parts):
    codes, absmax, inner, offset = parts
    for m in (1, 16):
        x = seeded((m, K), seed=m, dtype=torch.bfloat16, device="cuda")
        y = torch.full((m, N), float("nan"), dtype=x.dtype, device="cuda")
        _extension.C.nf4_few_rows(
            x=x.data_ptr(), pitch_x=K, packed=codes.data_ptr(), absmax=absmax.data_ptr(),
            nested_absmax=_extension.ptr(inner), offset=_extension.ptr(offset), bias=0,
            y=y.data_ptr(), pitch_y=N, m=m, n=N, k=K, dtype=_extension.DTYPES[x.dtype], blocksize=64,
            early=False, variant="nf4_few_rows_mma_sm80", **_extension.launch_args(x),
        )  # fmt: skip
        for rows in SLICES:
            exact = x.double() @ rows_of(parts, rows).double().T
            assert rms(y[:, rows], exact) < 4e-3


def test_backward(parts):
    """Rows of the weight that the gradient is zero for take no part."""
    codes, absmax, inner, offset = parts
    for at, rows in enumerate(SLICES):
        x = torch.zeros((4, K), dtype=torch.bfloat16, device="cuda", requires_grad=True)
        y = ops.nf4_linear(
            x, codes, absmax, out_features=N, nested_absmax=inner, nested_offset=offset
        )
        gradient = torch.zeros_like(y)
        gradient[:, rows] = seeded((4, SAMPLE), seed=at, dtype=x.dtype, device="cuda")
        y.backward(gradient)
        exact = gradient[:, rows].double() @ rows_of(parts, rows, x.dtype).double()
        assert rms(x.grad, exact) < 4e-3


def test_experts(parts):
    codes, absmax, inner, offset = parts
    shape = (8, N // 8, K)
    weight = NF4Weight(codes, absmax, (N, K), torch.bfloat16, 64, inner, offset)
    held = NF4Tensor(weight, shape)
    for index in (0, 7):
        dense = _expert(held, index).dense(torch.bfloat16)
        rows = slice(index * shape[1] + shape[1] - SAMPLE, (index + 1) * shape[1])
        assert torch.equal(dense[-SAMPLE:], rows_of(parts, rows, torch.bfloat16))


# --- two devices ---------------------------------------------------------------------------------


def results(device, nested):
    """What each op makes of the same values on a device, and the kernels that ran."""
    n, k = 9001, 1088
    made = {}
    with ops.recorded_kernels() as ran:
        parts = packed(n, k, device, nested=nested)
        codes, absmax, inner, offset = parts
        made |= {
            "codes": codes,
            "absmax": absmax,
            "weights": dequantize(parts, (n, k), torch.float16),
        }
        for m in (1, 16, 64, 256, 300):
            x = seeded((m, k), seed=m, dtype=torch.bfloat16, device=device).requires_grad_()
            scales = {"nested_absmax": inner, "nested_offset": offset}
            y = ops.nf4_linear(x, codes, absmax, out_features=n, **scales)
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
            made |= {f"y {m}": y.detach(), f"gradient {m}": gradient}
    torch.cuda.synchronize(device)
    assert all(tensor.device == torch.device(device) for tensor in made.values())
    return {name: tensor.cpu() for name, tensor in made.items()}, list(ran)


@pytest.mark.parametrize("nested", [False, True])
def test_another_device_than_the_current_one(nested):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, {torch.cuda.device_count()} are here")
    kinds = [torch.cuda.get_device_name(index) for index in (0, 1)]
    if kinds[0] != kinds[1]:
        pytest.skip(f"needs two GPUs of one kind, here are {' and '.join(kinds)}")
    for current in (0, 1):
        with torch.cuda.device(current):
            here, ran_here = results(f"cuda:{current}", nested)
            there, ran_there = results(f"cuda:{1 - current}", nested)
            assert torch.cuda.current_device() == current
        assert ran_here == ran_there
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            assert torch.equal(tensor, there[name]), name
