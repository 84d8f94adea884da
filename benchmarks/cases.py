# SPDX-License-Identifier: Apache-2.0
"""What is measured: one registry of cases.

Letters: M tokens, N out features, K in features, R rank.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

BLOCKSIZE = 64
SCALE = 2.0
DROPOUT = 0.1
LLAMA = {"hidden": 4096, "kv": 1024, "ff": 14336}
"""Sizes of a layer of Llama-3-8B."""
TINY_LLAMA = {"hidden": 64, "kv": 32, "ff": 128}
LORA_METHODS = ("lora", "qlora")
METHODS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "sft": ((), {}),
    "p_tuning": ((), {"virtual": 20}),
    "bottleneck": (("adapter_bottleneck",), {"r": 32}),
    "ia3": (("adapter_scale", "scaled_linear"), {}),
}
"""The other methods: ops that they use, and sizes of their adapters, by default in all libraries."""


class Linear(NamedTuple):
    """A linear layer of a case: where it lies in the block, what it reads, its sizes."""

    path: str
    source: str
    n: int
    k: int


def _llama_linears(hidden: int, kv: int, ff: int) -> list[Linear]:
    return [
        Linear("self_attn.q_proj", "x", hidden, hidden),
        Linear("self_attn.k_proj", "x", kv, hidden),
        Linear("self_attn.v_proj", "x", kv, hidden),
        Linear("self_attn.o_proj", "attended", hidden, hidden),
        Linear("mlp.gate_proj", "normed", ff, hidden),
        Linear("mlp.up_proj", "normed", ff, hidden),
        Linear("mlp.down_proj", "hidden", hidden, ff),
    ]


@dataclass(frozen=True)
class Case:
    """One measured problem.

    Attributes:
        name: the op, then what distinguishes the case, separated by slashes.
        op: the family that providers register for.
        covers: public ops of pyfast that the case exercises.
        shape: sizes by name: the letters above; of a model hidden, kv and ff (intermediate), and for a
            training step layers, vocab, batch, tokens of each sequence and virtual ones in front.
        modes: "fwd", and "fwdbwd" where the op has a gradient; "step" for a training step.
        nf4: the weight is stored in NF4. nested: with 8-bit scales.
        dropout: of the adapter's input.
        method: what a training step trains.
        checkpointing: of each layer's activations.
        tolerance: largest max_err that is still the same computation.
    """

    name: str
    op: str
    covers: tuple[str, ...]
    shape: dict[str, int]
    modes: tuple[str, ...] = ("fwd",)
    nf4: bool = False
    nested: bool = False
    dropout: float = 0.0
    method: str = "lora"
    checkpointing: bool = False
    tolerance: float = 0.05

    @property
    def adapted(self) -> bool:
        """Whether its linears have LoRA."""
        step = self.op == "train_step" and self.method in LORA_METHODS
        return step or self.op.startswith("lora_")

    @cached_property
    def linears(self) -> list[Linear]:
        """Every linear layer, in the order of the forward."""
        s = self.shape
        if "hidden" not in s:
            return [Linear("proj", "x", s["n"], s["k"])] if {"m", "n"} <= s.keys() else []
        layer = _llama_linears(s["hidden"], s["kv"], s["ff"])
        if self.op == "train_step":
            return [
                linear._replace(path=f"model.layers.{i}.{linear.path}")
                for i in range(s["layers"])
                for linear in layer
            ]
        chosen = {"lora_qkv": layer[:3], "lora_mlp": layer[4:], "lora_layer": layer}[self.op]
        first = chosen[0].source
        return [
            Linear(f"layers.0.{path}", "x" if source == first else source, n, k)
            for path, source, n, k in chosen
        ]

    @property
    def inputs(self) -> dict[str, int]:
        """What is fed in: name to width. The MLP makes its hidden activations itself."""
        if not self.linears:
            return {"x": self.shape["k"]} if "m" in self.shape else {}
        widths = {linear.source: linear.k for linear in self.linears}
        return {"x": widths["x"]} if self.op == "lora_mlp" else widths

    @property
    def outputs(self) -> list[int]:
        """Widths of what comes out."""
        if not self.linears:
            return list(self.inputs.values())
        widths = [linear.n for linear in self.linears]
        return widths[-1:] if self.op == "lora_mlp" else widths

    @property
    def tokens(self) -> int:
        """Rows of the inputs."""
        s = self.shape
        return s.get("m", s.get("batch", 0) * (s.get("tokens", 0) + s.get("virtual", 0)))

    def flops(self, mode: str) -> int:
        """Floating-point operations of the linears' matrix products; a frozen weight has no gradient."""
        s, m = self.shape, self.tokens
        dense = sum(2 * m * n * k for _, _, n, k in self.linears)
        dense += 2 * m * s.get("vocab", 0) * s.get("hidden", 0)
        # A bottleneck behind attention and MLP of each layer, of two matrices; otherwise LoRA.
        sizes = [(n, k) for _, _, n, k in self.linears]
        if self.method == "bottleneck":
            sizes = 2 * s["layers"] * [(s["hidden"], s["hidden"])]
        low_rank = sum(2 * m * s.get("r", 0) * (n + k) for n, k in sizes)
        if mode == "fwd":
            return dense + low_rank
        return (3 if self.method == "sft" else 2) * dense + 3 * low_rank

    def bytes(self, mode: str, itemsize: int) -> int:
        """Bytes that must move once: weights in their stored form, inputs and outputs of the linears."""
        s, m = self.shape, self.tokens
        n, k, r = (s.get(letter, 0) for letter in "nkr")
        numel = sum(n * k for _, _, n, k in self.linears) or n * k
        stored = numel * itemsize
        packed = numel // 2 + numel // BLOCKSIZE * (1 if self.nested else 4)
        if self.op == "copy":
            return 2 * stored
        if self.op in ("nf4_quantize", "nf4_dequantize"):
            return packed + stored
        if not self.linears:
            return 2 * m * k * itemsize + 2 * k * r * itemsize
        weight = packed if self.nf4 else stored
        read = m * sum({linear.source: linear.k for linear in self.linears}.values())
        written = m * sum(linear.n for linear in self.linears)
        factors = sum(r * (n + k) for _, _, n, k in self.linears)
        forward = weight + (read + written + factors) * itemsize
        # Backward reads dy, the weight and, for the adapter's gradients, x; it writes dx, dA and dB.
        adapted = r > 0 or self.op == "scaled_linear"
        backward = weight + (read + written + (read + 2 * factors if adapted else 0)) * itemsize
        return forward if mode == "fwd" else forward + backward


def _weights(op: str, sizes: list[tuple[int, int]]) -> Iterator[Case]:
    for nested in (False, True):
        kind = "nested" if nested else "flat"
        covers = (op, "nf4_nest") if nested and op == "nf4_quantize" else (op,)
        # One code step apart is possible for a quantiser that rounds a tie differently.
        tolerance = 0.25 if op == "nf4_quantize" else 0.01
        for n, k in sizes:
            yield Case(
                f"{op}/{kind}/{n}x{k}", op, covers, {"n": n, "k": k},
                nf4=True, nested=nested, tolerance=tolerance,
            )  # fmt: skip


def _nf4_linears(sizes: list[tuple[int, int]], rows: list[int], nested: bool) -> Iterator[Case]:
    for n, k in sizes:
        for m in rows:
            kind = "nested" if nested else "flat"
            yield Case(
                f"nf4_linear/{kind}/{n}x{k}/m{m}", "nf4_linear", ("nf4_linear",),
                {"m": m, "n": n, "k": k}, ("fwd", "fwdbwd"), nf4=True, nested=nested,
            )  # fmt: skip


def _loras(
    base: str,
    sizes: list[tuple[int, int]],
    rows: list[int],
    ranks: list[int],
    dropouts: tuple[float, ...] = (0.0,),
) -> Iterator[Case]:
    for n, k in sizes:
        for m in rows:
            for r in ranks:
                for p in dropouts:
                    name = f"lora_linear/{base}/{n}x{k}/r{r}/m{m}" + (f"/p{p}" if p else "")
                    yield Case(
                        name, "lora_linear", ("lora_linear",), {"m": m, "n": n, "k": k, "r": r},
                        ("fwd", "fwdbwd"), nf4=base == "nf4", nested=base == "nf4", dropout=p,
                    )  # fmt: skip


def _blocks(
    op: str,
    sizes: dict[str, int],
    rows: list[int],
    ranks: list[int],
    dropouts: tuple[float, ...] = (0.0,),
    *,
    nf4: bool = False,
) -> Iterator[Case]:
    base = f"{op}/nf4" if nf4 else op
    for m, r, p in itertools.product(rows, ranks, dropouts):
        yield Case(
            f"{base}/r{r}/m{m}" + (f"/p{p}" if p else ""), op, ("lora_linear", "lora_group"),
            {"m": m, **sizes, "r": r}, ("fwd", "fwdbwd"), nf4=nf4, nested=nf4, dropout=p,
        )  # fmt: skip


def _steps(
    name: str, model: dict[str, int], batches: list[tuple[int, int]], r: int
) -> Iterator[Case]:
    """Of LoRA over dense and NF4 weights at every batch, and of the other methods at the first."""
    plain = Case("", "train_step", (), {}, ("step",), tolerance=0.1)
    for method in LORA_METHODS:
        label, nf4 = f"r{r}" if method == "lora" else method, method == "qlora"
        for (batch, tokens), checkpointing in itertools.product(batches, (False, True)):
            yield replace(
                plain,
                name=f"train_step/{name}/{label}/{batch}x{tokens}" + "/checkpointing" * checkpointing,
                covers=("lora_linear", "lora_group"), method=method, nf4=nf4, nested=nf4,
                shape={"batch": batch, "tokens": tokens, **model, "r": r},
                checkpointing=checkpointing,
            )  # fmt: skip
    batch, tokens = batches[0]
    for method, (covers, sizes) in METHODS.items():
        yield replace(
            plain, name=f"train_step/{name}/{method}/{batch}x{tokens}", covers=covers, method=method,
            shape={"batch": batch, "tokens": tokens, **model, **sizes},
        )  # fmt: skip


def _adapters(sizes: list[tuple[int, int]], ranks: list[int]) -> Iterator[Case]:
    for m, k in sizes:
        modes = ("fwd", "fwdbwd")
        covers = ("adapter_scale",)
        yield Case(f"adapter_scale/{m}x{k}", "adapter_scale", covers, {"m": m, "k": k}, modes)
        for r in ranks:
            name, shape = f"adapter_bottleneck/{m}x{k}/r{r}", {"m": m, "k": k, "r": r}
            yield Case(name, "adapter_bottleneck", ("adapter_bottleneck",), shape, modes)


def _scaled_linears(sizes: list[tuple[int, int]], rows: list[int]) -> Iterator[Case]:
    for (n, k), m in itertools.product(sizes, rows):
        yield Case(
            f"scaled_linear/{n}x{k}/m{m}", "scaled_linear", ("scaled_linear",),
            {"m": m, "n": n, "k": k}, ("fwd", "fwdbwd"),
        )  # fmt: skip


def _doras(sizes: list[tuple[int, int]], rows: list[int], r: int) -> Iterator[Case]:
    for (n, k), m in itertools.product(sizes, rows):
        yield Case(
            f"dora_linear/{n}x{k}/r{r}/m{m}", "dora_linear", ("dora_linear", "dora_norms"),
            {"m": m, "n": n, "k": k, "r": r}, ("fwd", "fwdbwd"),
        )  # fmt: skip


def _dropouts(sizes: list[tuple[int, int]]) -> Iterator[Case]:
    for m, k in sizes:
        shape = {"m": m, "k": k}
        yield Case(f"dropout/{m}x{k}", "dropout", ("dropout",), shape, ("fwd", "fwdbwd"))


def _tiny() -> Iterator[Case]:
    size = [(64, 128)]
    for case in (
        *_weights("nf4_quantize", size),
        *_weights("nf4_dequantize", size),
        *_nf4_linears(size, [4], nested=False),
        *_nf4_linears(size, [4], nested=True),
        *_loras("dense", size, [4], [8], (0.0, DROPOUT)),
        *_loras("nf4", size, [4], [8]),
        *_blocks("lora_qkv", TINY_LLAMA, [4], [8], (0.0, DROPOUT)),
        *_blocks("lora_mlp", TINY_LLAMA, [4], [8], (0.0, DROPOUT)),
        *_blocks("lora_layer", TINY_LLAMA, [4], [8]),
        *_blocks("lora_layer", TINY_LLAMA, [4], [8], nf4=True),
        *_steps("llama", {"layers": 2, **TINY_LLAMA, "vocab": 96}, [(2, 8)], 4),
        *_doras(size, [4], 8),
        *_adapters([(4, 128)], [8]),
        *_scaled_linears(size, [4]),
        *_dropouts([(4, 128)]),
    ):
        yield replace(case, name=f"tiny/{case.name}")


def all_cases(device: str) -> list[Case]:
    """Every case of a device type. Those under `tiny/` only try the runner itself."""
    square = [(4096, 4096)]
    if device == "cpu":
        return [
            *_weights("nf4_quantize", square),
            *_weights("nf4_dequantize", square),
            *_nf4_linears(square, [1, 16, 64, 256, 1024], nested=False),
            *_loras("dense", square, [64, 512], [16]),
            *_loras("nf4", square, [64, 512], [16]),
            *_blocks("lora_qkv", LLAMA, [512], [16]),
            *_doras(square, [512], 16),
            *_adapters([(1024, 4096)], [64]),
            *_scaled_linears(square, [512]),
            *_dropouts([(1024, 4096)]),
            *_tiny(),
        ]
    # Llama-3-8B's and 70B's projections; 6144 is 8B's q, k and v in one.
    matrices = [*square, (14336, 4096), (28672, 8192)]
    layers = [*square, (14336, 4096), (4096, 14336), (1024, 4096)]
    rows, ranks = [512, 2048, 8191, 8192, 16384], [8, 16, 64, 128]
    return [
        *(Case(f"copy/{n}x{k}", "copy", (), {"n": n, "k": k}) for n, k in matrices),
        *_weights("nf4_quantize", matrices),
        *_weights("nf4_dequantize", matrices),
        *_nf4_linears(matrices, [1, 16, 64, 256], nested=False),
        *_nf4_linears([*matrices, (4096, 14336)], [1, 16, 64, 128, 256], nested=True),
        *_nf4_linears(layers, [512, 1024, 2048, 4096, 8192], nested=True),
        *_loras("dense", [*layers, (6144, 4096)], rows, ranks, (0.0, DROPOUT)),
        *_loras("nf4", layers, [512, 2048, 8192], [16, 64]),
        *_blocks("lora_qkv", LLAMA, rows, ranks, (0.0, DROPOUT)),
        *_blocks("lora_mlp", LLAMA, rows, ranks, (0.0, DROPOUT)),
        *_blocks("lora_layer", LLAMA, rows, [16, 128]),
        *_blocks("lora_layer", LLAMA, [2048, 8192], [16, 64], nf4=True),
        *_steps("llama3_8b", {"layers": 8, **LLAMA, "vocab": 128256}, [(2, 4096), (1, 1024)], 16),
        *_doras(layers, [2048, 8192], 16),
        *_adapters([(8192, 4096), (8192, 14336)], [16, 64, 128, 256]),
        *_scaled_linears([*square, (4096, 14336)], [2048, 8191, 8192]),
        *_dropouts([(8192, 4096), (8192, 14336)]),
        *_tiny(),
    ]


SHORT = {
    "cpu": (
        "nf4_quantize/nested/4096x4096",
        "nf4_dequantize/nested/4096x4096",
        "nf4_linear/flat/4096x4096/m64",
        "lora_linear/*/4096x4096/r16/m64",
        "adapter_bottleneck/*",
    ),
    "cuda": (
        "nf4_quantize/nested/4096x4096",
        "nf4_dequantize/nested/4096x4096",
        "nf4_linear/nested/4096x4096/m2048",
        "lora_linear/dense/*x4096/r16/m8192",
        "lora_linear/dense/4096x14336/r16/m8192",
        "lora_linear/dense/4096x4096/r128/m8192",
        "lora_linear/dense/4096x4096/r16/m8192/p0.1",
        "lora_linear/dense/4096x4096/r16/m2048",
        "lora_linear/dense/4096x4096/r16/m8191",
        "lora_linear/nf4/4096x4096/r16/m8192",
        "lora_qkv/r16/m8192",
        "lora_mlp/r16/m8192",
        "lora_layer/r*/m8192",
        "lora_layer/nf4/r16/m8192",
        "dora_linear/4096x4096/r16/m8192",
        "dropout/8192x4096",
        "adapter_bottleneck/8192x4096/r64",
        "scaled_linear/4096x14336/m8192",
    ),
}
"""Globs of the cases that take about two minutes together."""


def select(device: str, pattern: str, *, short: bool = False) -> list[Case]:
    """Cases whose name matches a glob; the tiny ones only where the glob begins with `tiny`."""

    def matches(name: str, *globs: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    tiny = pattern.startswith("tiny")
    return [
        case
        for case in all_cases(device)
        if matches(case.name, pattern)
        and (tiny or not case.name.startswith("tiny/"))
        and (not short or matches(case.name, *SHORT[device]))
    ]
