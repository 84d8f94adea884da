# SPDX-License-Identifier: Apache-2.0
"""Dropout masks from Philox4x32-7 counters: nothing is saved but a seed and an offset.

Element (row, column) of a mask has a number of 16 random bits and is kept where that is at least the
threshold, p in steps of 1 / 65536. Bit j of the number is bit (column % 32) of word j % 4 of the block with
counter (row, 4 * (column // 32) + j // 4, offset low word, offset high word) and key (seed low word, seed
high word). So 32 neighbours are compared at once, a bit at a time, by logic on whole words; and where the
low bits of the threshold are 0, those of the numbers decide nothing and need not be drawn. Unless p is
within 1 / 32 of 0 or 1 it is therefore taken in steps of 1 / 256: two blocks for 32 elements instead of
four. Counters are global rows and columns, so any tiling and any shard draws the same mask.
This is the reference of `csrc/common/philox.h`, which draws the same bits.
Generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), where seven rounds pass
BigCrush; ten, the paper's margin, cost the GPU kernels a third more.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 7
LEVELS = 1 << 16


def threshold(p: float) -> int:
    """Sixteen-bit threshold below which an element is dropped."""
    step = 256 if 1 / 32 <= p <= 31 / 32 else 1
    return round(p * (LEVELS // step)) * step


def keep_scale(p: float) -> float:
    """1 / (the exact share that is kept), 0 where nothing is."""
    kept = LEVELS - threshold(p)
    return LEVELS / kept if kept else 0.0


def new_seed(device: torch.device) -> Tensor:
    """int64 [2], a seed and an offset from the device's default generator.

    It stays on the device, so `torch.manual_seed`, checkpointing's replay and CUDA graphs all reach it.
    """
    return torch.randint(-(1 << 63), (1 << 63) - 1, (2,), dtype=torch.int64, device=device)


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    product = value * constant  # wraps modulo 2^64: both words are still right
    return (product >> 32) & _LOW, product & _LOW


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """bool [rows, columns] on the seed's device.

    Args:
        seed: int64 [2]: seed and offset.
        rows: number of rows.
        columns: number of columns.
        p: probability of dropping, in [0, 1].
    """
    groups = -(-columns // 32)
    level = threshold(p)
    keep = torch.full((rows, groups), _LOW if level < LEVELS else 0, device=seed.device)
    for call in range(4):
        if level % (1 << (4 * call + 4)) == 0:
            continue  # bits that decide nothing
        for j, word in enumerate(_words(seed, rows, groups, call), 4 * call):
            keep = keep & word if level >> j & 1 else keep | word
    bits = keep[..., None] & (1 << torch.arange(32, device=seed.device)) != 0
    return bits.view(rows, groups * 32)[:, :columns]


def _words(seed: Tensor, rows: int, groups: int, call: int) -> tuple[Tensor, ...]:
    """The four words of each block of one call, int64 that broadcasts to [rows, groups]."""
    c0 = torch.arange(rows, device=seed.device)[:, None]
    c1 = 4 * torch.arange(groups, device=seed.device)[None, :] + call
    c2, c3 = seed[1] & _LOW, (seed[1] >> 32) & _LOW
    k0, k1 = seed[0] & _LOW, (seed[0] >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3
