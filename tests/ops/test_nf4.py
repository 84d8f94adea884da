# SPDX-License-Identifier: Apache-2.0
"""NF4 against bitsandbytes: bytes, values, nested scales; traps; malformed parts."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfast import _extension, ops
from pyfast.errors import PyfastError, QuantStateError
from pyfast.ops._nf4_format import NEST_MAP, NF4_CODE, NF4_THRESHOLDS
from pyfast.testing import seeded
from tests.cases import packed

bnb = pytest.importorskip("bitsandbytes.functional")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def digest(values):
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def test_the_tables_are_the_published_ones():
    code = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    nest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert digest(NF4_CODE) == code
    assert digest(NEST_MAP) == nest
    first = NF4_THRESHOLDS.view(torch.int32)[:3].tolist()
    assert [v & 0xFFFFFFFF for v in first] == [0xBF591CD8, 0xBF1C5270, 0xBEEB8480]


def theirs(w, blocksize, nested=False):
    return bnb.quantize_4bit(
        w.reshape(-1), blocksize=blocksize, quant_type="nf4", compress_statistics=nested
    )


def assert_same_bytes(w, blocksize):
    codes, absmax = ops.nf4_quantize(w, blocksize)
    their_codes, state = theirs(w, blocksize)
    assert torch.equal(codes.view(-1), their_codes.view(-1))
    assert torch.equal(absmax, state.absmax)
    return codes, absmax, their_codes, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 127, 4096, 5000, 33 * 64 + 7, 1 << 17])
def test_bytes_and_values_equal_bitsandbytes(numel, blocksize, dtype, device):
    if device == "cuda" and numel % 2:
        pytest.skip("bitsandbytes' CUDA kernel leaves the last nibble of an odd length undefined")
    w = seeded((numel,), seed=numel, dtype=dtype, device=device, scale=0.02)
    codes, absmax, their_codes, state = assert_same_bytes(w, blocksize)
    for out in DTYPES:
        state.dtype = out
        expected = bnb.dequantize_4bit(their_codes, state).view(-1)
        with ops.recorded_kernels() as ran:
            got = ops.nf4_dequantize(codes, absmax, (numel,), out, blocksize=blocksize)
        assert torch.equal(got, expected)
        assert [name.startswith("nf4_dequantize_") for _, name in ran] == [True]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_finite_half_value(dtype, device):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    w = bits.view(dtype)
    w = w[torch.isfinite(w)]
    w = w[torch.randperm(w.numel(), generator=torch.Generator().manual_seed(0))].to(device)
    assert_same_bytes(w[: w.numel() // 64 * 64], 64)


def test_extremes_and_subnormals():
    tiny, big = 1e-45, torch.finfo(torch.float32).max
    w = torch.tensor([tiny, -tiny, 1e-40, big, -big, 0.0, 1e-38, -1e-39] * 16)
    assert_same_bytes(w, 64)
    assert_same_bytes(w[w.abs() < 1], 64)


def test_a_zero_block_is_code_seven_and_both_forms_read_as_zero(device):
    w = torch.zeros(128, device=device)
    w[64:] = 1.0
    codes, absmax = ops.nf4_quantize(w)
    assert codes[:32].unique().tolist() == [0x77]
    codes[:32] = 0
    assert torch.equal(ops.nf4_dequantize(codes, absmax, (128,), torch.float32)[:64].abs(), w[:64])


@pytest.mark.parametrize("variant", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_reference(variant, dtype):
    name = f"nf4_dequantize_{variant}"
    reasons = {v["name"]: v["reason"] for v in _extension.C.variants("nf4_dequantize")}
    if reasons[name]:
        pytest.skip(reasons[name])
    for numel, blocksize in [(1, 32), (97, 32), (4096, 64), (70000, 128), (9000, 4096)]:
        w = seeded((numel,), seed=3, dtype=dtype)
        expected = ops.OPS["nf4_quantize"].reference(w, blocksize)
        codes = torch.full_like(expected[0], 0xEE)
        absmax = torch.full_like(expected[1], float("nan"))
        place = _extension.launch_args(w)
        kind = _extension.DTYPES[dtype]
        _extension.C.nf4_quantize(
            src=w.data_ptr(), dtype=kind, numel=numel, blocksize=blocksize,
            packed=codes.data_ptr(), absmax=absmax.data_ptr(),
            variant=f"nf4_quantize_{variant}", **place,
        )  # fmt: skip
        assert torch.equal(codes, expected[0])
        assert torch.equal(absmax, expected[1])
        out = torch.full((numel,), float("nan"), dtype=dtype)
        ran = _extension.C.nf4_dequantize(
            packed=codes.data_ptr(), absmax=absmax.data_ptr(), nested_absmax=0, offset=0,
            out=out.data_ptr(), dtype=kind, first_block=0, numel=numel, blocksize=blocksize,
            variant=name, **place,
        )  # fmt: skip
        assert ran == name
        arguments = (codes, absmax, (numel,), dtype, blocksize, None, None)
        assert torch.equal(out, ops.OPS["nf4_dequantize"].reference(*arguments))


# --- nested scales --------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 5000])
def test_nested_codes_are_the_nearest(blocks, device):
    absmax = seeded((blocks,), seed=1, device=device).abs() * 0.05
    scales = ops.nf4_nest(absmax)
    assert torch.equal(scales.offset, absmax.mean())
    centred = torch.nn.functional.pad(absmax - scales.offset, (0, -blocks % 256)).view(-1, 256)
    assert torch.equal(scales.absmax, centred.abs().amax(1))
    # bitsandbytes' CPU encoder, whose codes ours equal, looks values up in 65,536 bins of [-1, 1].
    slack = 1 / 32768 if device == "cpu" else 1e-6
    unit = (centred / scales.absmax[:, None].clamp(min=1e-38)).double().view(-1)[:blocks].cpu()
    table = NEST_MAP.double()
    chosen = (table[scales.codes.long().cpu()] - unit).abs()
    nearest = (table[None] - unit[:, None]).abs().amin(1)
    assert ((chosen - nearest) * scales.absmax.max().item()).max() < slack


def test_nested_codes_agree_with_bitsandbytes(device):
    w = seeded((1 << 20,), seed=1, dtype=torch.bfloat16, device=device, scale=0.02)
    _, state = theirs(w, 64, nested=True)
    scales = ops.nf4_nest(ops.nf4_quantize(w)[1])
    assert torch.equal(scales.offset.view(-1), state.offset.view(-1))
    assert torch.equal(scales.absmax, state.state2.absmax)
    assert torch.equal(scales.codes, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [64, 64 * 300, 1 << 18])
def test_nested_values_equal_bitsandbytes_given_its_codes(numel, dtype, device):
    w = seeded((numel,), seed=2, dtype=dtype, device=device, scale=0.02)
    codes, state = theirs(w, 64, nested=True)
    expected = bnb.dequantize_4bit(codes, state).view(-1)
    got = ops.nf4_dequantize(
        codes, state.absmax, (numel,), dtype,
        nested_absmax=state.state2.absmax, nested_offset=state.offset,
    )  # fmt: skip
    assert torch.equal(got, expected)


# --- the linear layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(48, 64), (33, 70), (5, 1), (3000, 1000)])
def test_one_hot_inputs_reproduce_the_weights(n, k, nested, device):
    codes, absmax, inner, offset = packed(n, k, device, nested=nested)
    scales = {"nested_absmax": inner, "nested_offset": offset}
    for dtype in (torch.float32, torch.bfloat16):
        w = ops.nf4_dequantize(codes, absmax, (n, k), dtype, **scales)
        rows = torch.arange(0, k, max(1, k // 16), device=device)
        x = torch.zeros(rows.numel(), k, dtype=dtype, device=device, requires_grad=True)
        with torch.no_grad():
            x[torch.arange(rows.numel()), rows] = 1
        with ops.recorded_kernels() as ran:
            y = ops.nf4_linear(x, codes, absmax, out_features=n, **scales)
            if any("few_rows" in name for _, name in ran):
                eps = torch.finfo(dtype).eps  # the scale is applied after the product
                assert ((y - w[:, rows].t()).abs() <= eps * w[:, rows].t().abs()).all()
            else:
                assert torch.equal(y, w[:, rows].t())
            picks = torch.arange(0, n, max(1, n // rows.numel()), device=device)[: rows.numel()]
            dy = torch.zeros_like(y)
            dy[torch.arange(picks.numel()), picks] = 1
            (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx[: picks.numel()], w[picks])
        assert all(name != "reference" for _, name in ran)


def test_large_weights_are_served_slab_by_slab():
    n, k = 17000, 1037  # more than one slab; rows that do not end on a block
    codes, absmax, _, _ = packed(n, k, "cpu")
    x, bias = seeded((3, k), seed=1), seeded((n,), seed=2)
    w = ops.nf4_dequantize(codes, absmax, (n, k), torch.float32)
    with ops.recorded_kernels() as ran:
        y = ops.nf4_linear(x, codes, absmax, bias, out_features=n)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    assert ran[0] == ("nf4_linear", "nf4_linear_slabs")
    assert len(ran) == 3


def test_a_forked_child_can_use_the_kernels():
    """torch's OpenMP threads do not survive a fork; ours must not wait for them."""
    script = """
import os, torch, pyfast.ops as ops
w = torch.randn(512, 1024)
packed = ops.nf4_quantize(w)[0].numpy()
child = os.fork()
if child == 0:
    os._exit(0 if (ops.nf4_quantize(w)[0].numpy() == packed).all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


# --- malformed parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"absmax": torch.ones(1)},
            QuantStateError,
            "absmax has 1 values, 64 are needed for 4096 weights at blocksize 64",
        ),
        ({"packed": torch.zeros(7, 1, dtype=torch.uint8)}, QuantStateError, "packed has 7 values"),
        ({"packed": torch.zeros(2048, 1)}, TypeError, "packed must be uint8, got float32"),
        ({"absmax": torch.ones(64).half()}, TypeError, "absmax must be float32, got float16"),
        ({"blocksize": 48}, ValueError, "blocksize must be one of"),
        ({"nested_absmax": torch.ones(1)}, QuantStateError, "go together; one of them is missing"),
        (
            {"nested_absmax": torch.ones(1), "nested_offset": torch.ones(1)},
            TypeError,
            "nested absmax codes must be uint8",
        ),
        ({"absmax": torch.ones(128)[::2]}, QuantStateError, "absmax must be contiguous"),
        ({"absmax": torch.ones(64, device="meta")}, ValueError, "absmax is on meta"),
    ],
)
def test_malformed_parts_are_named_before_a_kernel_runs(change, error, text):
    parts = {
        "packed": torch.zeros(2048, 1, dtype=torch.uint8), "absmax": torch.ones(64),
        "blocksize": 64, **change,
    }  # fmt: skip
    for call in (
        lambda packed, absmax, **rest: ops.nf4_dequantize(packed, absmax, (64, 64), **rest),
        lambda packed, absmax, **rest: ops.nf4_linear(
            torch.zeros(2, 64), packed, absmax, out_features=64, **rest
        ),
    ):
        with ops.recorded_kernels() as ran, pytest.raises(error, match=text):
            call(**parts)
        assert ran == []


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    packed_len=st.integers(0, 200),
    scales_len=st.integers(0, 20),
    shape=st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    blocksize=st.sampled_from([0, -64, 3, 32, 64, 4096, 1 << 40]),
    nested=st.sampled_from([None, 0, 1, 2]),
    scale_dtype=st.sampled_from([torch.uint8, torch.float32, torch.int8]),
)
def test_fuzzed_parts_give_values_or_a_typed_error(
    packed_len, scales_len, shape, blocksize, nested, scale_dtype
):
    codes = torch.zeros(packed_len, dtype=torch.uint8)
    absmax = torch.ones(scales_len, dtype=scale_dtype)
    inner = None if nested is None else torch.ones(nested)
    offset = None if nested is None else torch.zeros(())
    try:
        out = ops.nf4_dequantize(
            codes, absmax, shape, torch.float32, blocksize=blocksize,
            nested_absmax=inner, nested_offset=offset,
        )  # fmt: skip
    except (PyfastError, TypeError, ValueError):
        return
    assert out.shape == shape
    assert packed_len == -(-out.numel() // 2)
    assert scales_len == -(-out.numel() // blocksize)
