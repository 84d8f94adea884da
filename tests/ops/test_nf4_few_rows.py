# SPDX-License-Identifier: Apache-2.0
"""Which products with an NF4 weight the few-row kernels serve."""

from __future__ import annotations

import pytest
import torch

from pyfast.ops import _nf4_few_rows

HOPPER = (9, 0)
SERVED = {
    "m": 1, "n": 14336, "k": 4096, "dtype": torch.bfloat16, "blocksize": 64, "aligned": True,
    "capability": HOPPER, "sm_count": 132,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"m": 256},
        {"k": 64},
        {"m": 16, "n": 1},
        {"m": 64, "n": 256},
        {"m": 64, "n": 1024, "k": 8192},
        {"m": 128, "n": 1024},
        {"m": 256, "n": 4096, "k": 14336},
        {"k": 14336 + 64},
        {"dtype": torch.float16},
        {"m": 16, "capability": (8, 0)},
        {"m": 16, "capability": (10, 0)},
    ],
)
def test_served(changes):
    assert _nf4_few_rows.why_not(**(SERVED | changes)) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 257}, "up to 256 rows here, x has 257"),
        ({"m": 17, "capability": (8, 0)}, "up to 16 rows here, x has 17"),
        ({"m": 17, "capability": (10, 0)}, "up to 16 rows here, x has 17"),
        ({"dtype": torch.float32}, "take float16 and bfloat16, x is torch.float32"),
        ({"blocksize": 128}, "take blocks of 64, the weight has 128"),
        ({"k": 4096 + 32}, "multiples of 64 in features, x has 4128"),
        (
            {"m": 17, "n": 512, "k": 8192},
            "17 rows and 512 out features a dequantised scratch is faster",
        ),
        ({"m": 128, "n": 256}, "128 rows and 256 out features a dequantised scratch is faster"),
        ({"m": 128, "n": 1024, "k": 8192}, "128 rows and 1024 out features a dequantised scratch"),
        ({"m": 256, "n": 1024}, "256 rows and 1024 out features a dequantised scratch is faster"),
        ({"aligned": False}, "do not lie at multiples of 16 bytes"),
        ({"capability": (8, 9)}, "do not fit a GPU of compute capability (8, 9)"),
        ({"capability": (7, 5)}, "do not fit a GPU of compute capability (7, 5)"),
    ],
)
def test_refused_with_the_reason(changes, reason):
    assert reason in _nf4_few_rows.why_not(**(SERVED | changes))


def test_a_weight_is_settled_once_it_was_read_as_it_is():
    codes, absmax = torch.zeros(8, 1, dtype=torch.uint8), torch.ones(1)
    assert [_nf4_few_rows._settled(codes, absmax) for _ in range(2)] == [False, True]
    for written in (codes, absmax):
        written.add_(1)
        assert [_nf4_few_rows._settled(codes, absmax) for _ in range(2)] == [False, True]
    assert not _nf4_few_rows._settled(codes.clone(), absmax)
    with torch.inference_mode():
        codes = codes.clone()
    assert not any(_nf4_few_rows._settled(codes, absmax) for _ in range(2))
