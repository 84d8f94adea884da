# SPDX-License-Identifier: Apache-2.0
"""How times are taken: interleaved rounds in random order, cold and in bursts, eager and graph-replayed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 1000
BURST_SECONDS = 0.02
"""About how long a burst runs: long enough that launches queue up and the card's power settles."""
MAX_BURST = 64

Step = Callable[[int], object]
"""Does the work once on copy `i` of the operands."""


@dataclass
class Samples:
    """Milliseconds of one step, a number a round.

    Attributes:
        cold: eager, caches flushed, the device idle before: includes the host's time.
        burst: eager, steps queued back to back over rotating operands, mean of the burst.
        graph_cold: replay of a CUDA graph after a flush: the device's time alone.
        graph_burst: replay of a graph of a whole burst.
    """

    cold: list[float] = field(default_factory=list)
    burst: list[float] = field(default_factory=list)
    graph_cold: list[float] = field(default_factory=list)
    graph_burst: list[float] = field(default_factory=list)


def quantile(values: list[float], q: float) -> float | None:
    """The q-quantile by linear interpolation, None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def between_events(work: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Queue `work` between two events, without waiting."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    return begin, end


class Clock:
    """Times callables on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.cache_bytes = 32 << 20
        if self.cuda:
            properties = torch.cuda.get_device_properties(device)
            self.cache_bytes = properties.L2_cache_size
        self._flush = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device=device)

    def allocated(self) -> int:
        """Bytes of tensors on a CUDA device."""
        return torch.cuda.memory_allocated(self.device)

    def flush(self) -> None:
        """Overwrite the last-level cache."""
        self._flush.add_(1)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object], *, cold: bool, idle: bool = True) -> float:
        """Milliseconds of `work`; with `idle` the device has nothing queued when it starts."""
        if cold:
            self.flush()
        if idle:
            self.synchronize()
        if not self.cuda:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        begin, end = between_events(work)
        end.synchronize()
        return begin.elapsed_time(end)


class Subject:
    """One provider's step, warmed up, with its graphs where the device has them and `graphs` allows it."""

    def __init__(
        self,
        step: Step,
        clock: Clock,
        copies: int,
        around: Callable[[Callable[[], object]], object],
        graphs: bool = True,
    ) -> None:
        self.samples = Samples()
        self.graph_error = ""
        self._step, self._clock, self._copies, self._around = step, clock, copies, around
        self._turn, self._capturing = 0, clock.cuda and graphs
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        around(self._prepare)

    def _prepare(self) -> None:
        for copy in range(self._copies):
            self._step(copy)
        estimate = min(self._clock.time(self._one, cold=False) for _ in range(3))
        wanted = int(BURST_SECONDS * 1e3 / max(estimate, 1e-3))
        self.burst = max(1, min(MAX_BURST, wanted))
        if self._capturing:
            try:
                single = self._capture(1)
                # Nobody reads what a replay leaves, so both may write it to the same memory.
                self._graphs = single, self._capture(self.burst, single.pool())
            except RuntimeError as error:
                self.graph_error = str(error).splitlines()[0]
                torch.cuda.synchronize()

    def _one(self) -> None:
        self._turn = (self._turn + 1) % self._copies
        self._step(self._turn)

    def _many(self) -> None:
        for _ in range(self.burst):
            self._one()

    def _capture(self, steps: int, pool: Any = None) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate their workspaces on a stream's first calls
                self._one()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            for _ in range(steps):
                self._one()
        return graph

    def measure(self) -> None:
        """One round: a sample for every column."""
        self._around(self._measure)

    def _measure(self) -> None:
        clock, samples = self._clock, self.samples
        samples.cold.append(clock.time(self._one, cold=True))
        samples.burst.append(clock.time(self._many, cold=False) / self.burst)
        if self._graphs is not None:
            single, many = self._graphs
            # Not idle: the replay is queued behind the flush, which hides the host's part of it.
            samples.graph_cold.append(clock.time(single.replay, cold=True, idle=False))
            samples.graph_burst.append(clock.time(many.replay, cold=False) / self.burst)


def interleave(subjects: list[Subject], seconds: float, rng: random.Random) -> int:
    """Measure all subjects round by round, each round in a fresh random order; returns the rounds."""
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or (time.perf_counter() < deadline and rounds < MAX_ROUNDS):
        for subject in rng.sample(subjects, len(subjects)):
            subject.measure()
        rounds += 1
    return rounds


def transient_mib(step: Step, clock: Clock) -> float | None:
    """Most memory that one step holds on the device beyond what was there before; None on CPU."""
    if not clock.cuda:
        return None
    clock.synchronize()
    before = clock.allocated()
    torch.cuda.reset_peak_memory_stats(clock.device)
    step(0)
    clock.synchronize()
    return (torch.cuda.max_memory_allocated(clock.device) - before) / 2**20
