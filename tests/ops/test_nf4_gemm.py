# SPDX-License-Identifier: Apache-2.0
"""Which products of many rows with an NF4 weight are made from its packed bytes."""

from __future__ import annotations

import pytest
import torch

from pyfast import _extension
from pyfast.ops import _nf4_gemm

SERVED = {
    "m": 1024, "n": 4096, "k": 4096, "by_out": True, "dtype": torch.bfloat16, "blocksize": 64,
    "aligned": True, "capability": (9, 0), "sm_count": 132,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"by_out": False}, {"dtype": torch.float16}, {"n": 4104}, {"by_out": False, "k": 4104}],
)
def test_served(changes):
    assert _nf4_gemm.why_not(**(SERVED | changes)) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (8, 0)}, "is for compute capability 9.0, the device has (8, 0)"),
        ({"capability": (10, 0)}, "is for compute capability 9.0, the device has (10, 0)"),
        ({"dtype": torch.float32}, "takes float16 and bfloat16, x is torch.float32"),
        ({"blocksize": 128}, "takes blocks of 64, the weight has 128"),
        ({"k": 4128}, "the weight has 4128 and 4096"),
        ({"n": 4100}, "the weight has 4096 and 4100"),
        ({"by_out": False, "n": 4128}, "the weight has 4128 and 4096"),
        ({"m": 8192}, "with 8192 rows, 4096 and 4096 features a dequantised scratch is as fast"),
        ({"aligned": False}, "does not lie at a multiple of 16 bytes"),
    ],
)
def test_refused_with_the_reason(changes, reason):
    assert reason in _nf4_gemm.why_not(**(SERVED | changes))


# Rows, columns of y and of x; us of the kernel, of the scratch (benchmarks/NOTES.md).
MEASURED = [
    (512, 4096, 4096, 47.1, 39.8),
    (1024, 4096, 4096, 54.5, 64.0),
    (2048, 4096, 4096, 108.2, 112.9),
    (512, 14336, 4096, 102.5, 146.2),
    (512, 4096, 14336, 161.4, 136.0),
    (1024, 14336, 4096, 210.9, 219.8),
    (1024, 4096, 14336, 177.9, 217.5),
    (2048, 14336, 4096, 372.7, 392.8),
    (2048, 4096, 14336, 361.2, 383.6),
    (512, 14336, 4096, 96.5, 144.0),
    (1024, 14336, 4096, 181.7, 207.2),
    (1024, 7168, 4096, 94.5, 114.6),
    (1024, 11008, 4096, 140.1, 163.3),
    (512, 28672, 8192, 369.9, 519.1),
]


@pytest.mark.parametrize(("m", "n", "k", "kernel", "scratch"), MEASURED)
def test_the_rule_agrees_with_what_was_measured(m, n, k, kernel, scratch):
    # 14336 out features by the forward's kernel, 4096 of as many by that of dx.
    assert _nf4_gemm.is_faster(m, n, k, n >= k, 132) == (kernel < scratch)


# Narrow tiles where they leave less of the last wave idle: us of wide and narrow ones.
@pytest.mark.parametrize(
    ("m", "n", "wide", "narrow"),
    [(512, 14336, 98.6, 96.5), (1024, 14336, 184.9, 181.7), (1024, 7168, 96.0, 94.5),
     (1024, 11008, 142.1, 140.1), (2048, 14336, 342.5, 372.6), (4096, 14336, 713.6, 756.9)],
)  # fmt: skip
def test_the_tiles_that_were_measured_to_be_faster_are_chosen(m, n, wide, narrow):
    chosen = 112 if narrow < wide else 128
    assert _nf4_gemm._tile(m, n, True, 132)[0] == chosen
    assert _nf4_gemm._tile(m, n, False, 132)[0] == 128


def test_what_the_extension_refuses():
    """Before any kernel runs, on every build."""
    served = {
        "device": -1, "x": 16, "pitch_x": 64, "packed": 16, "absmax": 16, "nested_absmax": 0,
        "offset": 0, "z": 16, "pitch_z": 8, "b": 16, "pitch_b": 8, "bias": 0, "y": 16,
        "pitch_y": 128, "m": 1, "n": 128, "k": 64, "r": 4, "by_out": True, "dtype": 2,
        "blocksize": 64, "threads": 1, "stream": 0, "variant": "",
    }  # fmt: skip
    for changes, sentence in (
        ({"dtype": 0}, "dtype must be"),
        ({"blocksize": 128}, "blocksize must be 64, got 128"),
        ({"m": 0}, "must be positive"),
        ({"r": -1}, "r not negative"),
        ({"k": 96, "pitch_x": 96}, "columns must be a multiple of 64"),
        ({"by_out": False, "n": 96}, "columns must be a multiple of 64"),
        ({"n": 100}, "its rows of 8"),
        ({"nested_absmax": 16}, "belong together"),
        ({"packed": 0}, "packed is a null pointer"),
        ({"packed": 17}, "multiples of 16 bytes"),
        ({"pitch_x": 56}, "multiples of 16 bytes"),
        ({"pitch_y": 130}, "multiples of 16 bytes"),
        ({"z": 0}, "z is a null pointer"),
        ({"b": 24}, "z and b must lie"),
        ({"pitch_b": 0}, "z and b must lie"),
        ({}, "no kernel can run here"),
        ({"variant": "nf4_gemm_sm90_tall"}, "this build has no variant .nf4_gemm_sm90_tall"),
    ):
        with pytest.raises(ValueError, match=sentence):
            _extension.C.nf4_gemm(**(served | changes))
