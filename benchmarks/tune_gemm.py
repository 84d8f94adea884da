# SPDX-License-Identifier: Apache-2.0
"""Regenerates csrc/lora/gemm_plans.inc: the kernel and tile order for each shape of the LoRA linear's GEMM.

    python -m benchmarks.tune_gemm --out csrc/lora/gemm_plans.inc     (about three minutes on an H100)

Every kernel, swizzle and raster order is timed with rank 16 inside, in bursts replayed from a CUDA graph, in
a new random order each round; the best ten then race the library again. All of it is done back to back, where
power limits the clock, and with pauses as long as the bursts, where it does not: kernels rank differently
(128x128 pingpong tiles are 2 % ahead in the first and 20 % behind in the second), so the score is the
geometric mean of both.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import between_events, quantile
from pyfast import _extension

RANK = 16
COPIES = 3
"""Operand sets in turn, so that no burst finds its weights in the cache."""
LAYERS = [(4096, 4096), (4096, 1024), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096)]
LARGE = [(8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)]
SHAPES = [(m, *layer) for m in (512, 2048, 8192) for layer in LAYERS]
SHAPES += [(m, *layer) for m in (2048, 8192) for layer in LARGE]
SPECIAL = ("masked", "making", "scaled", "sm80")
"""Words in the names of kernels that are chosen for what else they do, or for other GPUs."""
HEADER = """\
// By out feature?, M, K, N: {{kernel, swizzle, along N}}. In the comment: time with rank {rank} over the
// library's without. Written by benchmarks/tune_gemm.py on an {card}.
"""

Launch = Callable[[int], object]


class Operands:
    """One set of matrices of y = x W^T + z B^T."""

    def __init__(self, by_out: bool, m: int, k: int, n: int) -> None:
        def random_matrix(rows: int, cols: int) -> torch.Tensor:
            return torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)

        self.by_out = by_out
        self.x = random_matrix(m, k)
        self.w = random_matrix(n, k) if by_out else random_matrix(k, n)
        self.z = random_matrix(m, RANK)
        self.b = random_matrix(n, RANK) if by_out else random_matrix(RANK, n)
        self.y = random_matrix(m, n)

    def library(self) -> object:
        """x W^T by torch."""
        return torch.mm(self.x, self.w.t() if self.by_out else self.w, out=self.y)

    def ours(self, plan: tuple[int, int, bool]) -> object:
        """x W^T + z B^T by one of our kernels, on as many blocks as there are SMs."""
        (m, k), n = self.x.shape, self.y.shape[1]
        pointers = [t.data_ptr() for t in (self.x, self.w, self.z, self.b)]
        stream = _extension.stream(self.x.device.index)
        code = _extension.DTYPES[self.x.dtype]
        return _extension.C.lora_gemm(
            self.x.device.index, stream, code, self.by_out, m, n, k, RANK, *pointers, RANK, 0,
            self.y.data_ptr(), *plan, 0, 0, 0, 0,
        )  # fmt: skip


def burst(launch: Launch, count: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` launches in a row."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i)
    return graph


def race(
    graphs: dict[Any, torch.cuda.CUDAGraph], rounds: int, count: int, pause: int = 0
) -> dict[Any, float]:
    """Median microseconds a launch of each, in a new order each round; `pause` clocks before each.

    Nothing waits between them, so that without pauses the card has no rest.
    """
    events: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {key: [] for key in graphs}
    for _ in range(rounds):
        for key in random.sample(list(graphs), len(graphs)):
            if pause:
                torch.cuda._sleep(pause)
            events[key].append(between_events(graphs[key].replay))
    torch.cuda.synchronize()
    times = {
        key: [start.elapsed_time(stop) for start, stop in pairs] for key, pairs in events.items()
    }
    return {key: quantile(each, 0.5) / count * 1e3 for key, each in times.items()}


def tuned_kernels(names: list[str]) -> list[int]:
    """Indices of the kernels that the table chooses from; the others do more than this product."""
    return [i for i, name in enumerate(names) if not any(word in name for word in SPECIAL)]


def best_plan(by_out: bool, m: int, k: int, n: int) -> tuple[tuple[int, int, bool], float]:
    """The fastest plan for a shape, and its time over the library's."""
    sets = [Operands(by_out, m, k, n) for _ in range(COPIES)]
    count, rounds = (6, 15) if m * k * n < 3e11 else (3, 9)
    graphs: dict[Any, torch.cuda.CUDAGraph] = {}
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        graphs[library] = burst(lambda i: sets[i % COPIES].library(), count)
    kernels = tuned_kernels(_extension.C.lora_gemm_kernels())
    for plan in itertools.product(kernels, (1, 2, 4, 8), (False, True)):
        graphs[plan] = burst(lambda i, plan=plan: sets[i % COPIES].ours(plan), count)  # type: ignore[misc]
    pause = int(1.7e9 * count * 2 * m * k * n / 650e12)

    def scores(keys: list[Any], rounds: int) -> dict[Any, float]:
        entrants = {key: graphs[key] for key in keys}
        times = [race(entrants, rounds, count, length) for length in (0, pause)]
        library = [min(t["cublas"], t["cublaslt"]) for t in times]
        return {
            key: math.sqrt(times[0][key] / library[0] * times[1][key] / library[1])
            for key in keys
            if isinstance(key, tuple)
        }

    first = scores(list(graphs), 2)
    finalists = sorted(first, key=first.__getitem__)[:10]
    final = scores(["cublas", "cublaslt", *finalists], rounds)
    best = min(final, key=final.__getitem__)
    return best, final[best]


def main() -> None:
    """Measure every shape and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    warm = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(300):
        torch.mm(warm, warm)
    lines = [HEADER.format(rank=RANK, card=torch.cuda.get_device_name())]
    for by_out in (False, True):
        for m, k_in, n_out in sorted(SHAPES):
            k, n = (k_in, n_out) if by_out else (n_out, k_in)
            (kernel, swizzle, along_n), ratio = best_plan(by_out, m, k, n)
            plan = f"{{{kernel}, {swizzle}, {str(along_n).lower()}}}"
            line = f"{{{str(by_out).lower()}, {m}, {k}, {n}, {plan}}},  // {ratio:.3f}\n"
            print(line, end="", flush=True)
            lines.append(line)
            torch.cuda.empty_cache()
    out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
