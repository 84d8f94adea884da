# SPDX-License-Identifier: Apache-2.0
"""The constants of the NF4 format, bit for bit those of bitsandbytes.

The 16 values are the quantiles of a normal distribution from QLoRA (Dettmers et al., 2023, appendix E)
as published in float32; the quantiser's thresholds are the float32 midpoints of neighbours. The 8-bit
map for nested scales is the signed dynamic data type of "8-bit Approximations for Parallelism in Deep
Learning" (Dettmers, 2015).
"""

from __future__ import annotations

import torch

NF4_CODE_BITS = (
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)  # fmt: skip


def _from_bits(bits: tuple[int, ...]) -> torch.Tensor:
    signed = [value - (1 << 32) if value >= 1 << 31 else value for value in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def _dynamic_map() -> torch.Tensor:
    """256 values: for each decade 10^-6..10^0, midpoints of 2^i equal parts of [0.1, 1], both signs."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (exponent - 6)).tolist()
        values += means + [-mean for mean in means]
    return torch.tensor(sorted(values), dtype=torch.float32)


NF4_CODE = _from_bits(NF4_CODE_BITS)
"""float32 [16], ascending."""

NF4_THRESHOLDS = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
"""float32 [15]: a scaled weight x gets the code that counts the thresholds below x."""

NEST_MAP = _dynamic_map()
"""float32 [256], ascending: the 8-bit codes of nested scales."""

NEST_THRESHOLDS = (NEST_MAP[1:] + NEST_MAP[:-1]) / 2
