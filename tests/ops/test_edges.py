# SPDX-License-Identifier: Apache-2.0
"""Threads, memory around the outputs, empty and hostile arguments, recompilation."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pyfast import _extension, ops
from pyfast.ops import OPS
from pyfast.testing import seeded
from tests.cases import bottleneck_args, lora_args, packed

F = torch.nn.functional
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_threads(count, work):
    """Run `work(i)` in `count` threads that start together; return what went wrong."""
    gate, failures = threading.Barrier(count), []

    def run(index):
        gate.wait()
        try:
            work(index)
        except Exception as error:  # a thread's exception would be lost
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_threads_do_not_share_a_dequantised_weight(device):
    n, k, threads = 256, 512, 8
    weights = [packed(n, k, device, seed=seed) for seed in range(threads)]
    dy, x = seeded((16, n), seed=1, device=device), seeded((16, k), seed=2, device=device)

    def both(index):
        codes, absmax, *_ = weights[index]
        y = ops.nf4_linear(x, codes, absmax, out_features=n)
        dx = OPS["nf4_linear_backward"].overload(dy, codes, absmax, k, 64, None, None)
        return y, dx

    expected = [both(index) for index in range(threads)]
    wrong = []

    def work(index):
        for _ in range(100):
            got = both(index)
            wrong.extend(
                index
                for one, other in zip(got, expected[index], strict=True)
                if not torch.equal(one, other)
            )

    assert in_threads(threads, work) == []
    assert wrong == []


def test_training_in_threads(device):
    """Each thread has its own graph; autograd's own threads serve all of them."""
    layers = [
        lora_args((8,), 48, 96, 4, device, torch.float32, nf4="flat", dropout=0.25)
        for _ in range(4)
    ]

    def grads(args):
        y, _ = OPS["lora_linear"].overload(*args)
        return torch.autograd.grad(y.square().sum(), (args[0], args[3], args[4]))

    expected = [grads(args) for args in layers]

    def work(index):
        for _ in range(25):
            for got, want in zip(grads(layers[index]), expected[index], strict=True):
                assert torch.equal(got, want)

    assert in_threads(len(layers), work) == []


# --- the kernels, called directly ---------------------------------------------------------------------


def runnable(op, device):
    """Names of the kernels for this device that can run here."""
    if _extension.C is None:
        pytest.skip(_extension.reason)
    return [
        v["name"]
        for v in _extension.C.variants(op)
        if v["device"] == device and not v["reason"]
    ]  # fmt: skip


def guarded(numel, dtype, device, fill):
    """A buffer inside a larger one of `fill`, and a function that tells whether the rest is intact."""
    around = torch.full((numel + 128,), fill, dtype=dtype, device=device)
    before = around.clone().view(torch.uint8)

    def intact():
        after = around.view(torch.uint8)
        edge, size = 64 * around.element_size(), numel * around.element_size()
        return torch.equal(after[:edge], before[:edge]) and torch.equal(
            after[edge + size :], before[edge + size :]
        )

    return around[64 : 64 + numel], intact


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantise_from_any_block_and_nowhere_else(dtype, nested, device):
    for blocksize, numel in [(32, 700), (64, 64 * 300 + 5), (128, 1), (4096, 9001)]:
        w = seeded((numel,), seed=3, device=device)
        codes, absmax = ops.nf4_quantize(w, blocksize)
        inner = offset = None
        if nested:
            absmax, inner, offset = ops.nf4_nest(absmax)
        args = (codes, absmax, [numel], dtype, blocksize, inner, offset)
        whole = OPS["nf4_dequantize"].reference(*args)
        blocks = -(-numel // blocksize)
        for name, first in itertools.product(
            runnable("nf4_dequantize", device), {0, blocks // 2, blocks - 1}
        ):
            count = numel - first * blocksize
            out, intact = guarded(count, dtype, device, float("nan"))
            for threads in (1, 3):
                place = {**_extension.launch_args(w), "threads": threads}
                ran = _extension.C.nf4_dequantize(
                    packed=codes.data_ptr(), absmax=absmax.data_ptr(),
                    nested_absmax=_extension.ptr(inner), offset=_extension.ptr(offset),
                    out=out.data_ptr(), dtype=_extension.DTYPES[dtype], first_block=first,
                    numel=count, blocksize=blocksize, variant=name, **place,
                )  # fmt: skip
                assert ran == name
                assert torch.equal(out, whole[first * blocksize :])
                assert intact()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantise_writes_its_outputs_and_nothing_else(dtype, device):
    for blocksize, numel in [(32, 1), (32, 97), (64, 40000), (4096, 9001)]:
        w = seeded((numel,), seed=3, dtype=dtype, device=device)
        expected = ops.nf4_quantize(w, blocksize)
        for name in runnable("nf4_quantize", device):
            codes, codes_intact = guarded(-(-numel // 2), torch.uint8, device, 0xEE)
            absmax, absmax_intact = guarded(
                -(-numel // blocksize), torch.float32, device, float("nan")
            )
            for threads in (1, 3):
                place = {**_extension.launch_args(w), "threads": threads}
                _extension.C.nf4_quantize(
                    src=w.data_ptr(), dtype=_extension.DTYPES[dtype], numel=numel,
                    blocksize=blocksize, packed=codes.data_ptr(), absmax=absmax.data_ptr(),
                    variant=name, **place,
                )  # fmt: skip
                assert torch.equal(codes, expected[0].view(-1))
                assert torch.equal(absmax, expected[1])
                assert codes_intact()
                assert absmax_intact()


@pytest.mark.parametrize("blocks", [1, 255, 257, 5000])
def test_nest_writes_its_outputs_and_nothing_else(blocks, device):
    absmax = seeded((blocks,), seed=1, device=device).abs()
    expected = ops.nf4_nest(absmax)
    for name in runnable("nf4_nest", device):
        codes, codes_intact = guarded(blocks, torch.uint8, device, 0xEE)
        scale, scale_intact = guarded(-(-blocks // 256), torch.float32, device, float("nan"))
        _extension.C.nf4_nest(
            absmax=absmax.data_ptr(), num_blocks=blocks, offset=expected.offset.data_ptr(),
            codes=codes.data_ptr(), nested_absmax=scale.data_ptr(), variant=name,
            **_extension.launch_args(absmax),
        )  # fmt: skip
        assert torch.equal(codes, expected.codes)
        assert torch.equal(scale, expected.absmax)
        assert codes_intact()
        assert scale_intact()


def test_an_unknown_variant_is_refused(device):
    assert "nf4_quantize_none" not in runnable("nf4_quantize", device)
    w = torch.zeros(64, device=device)
    with pytest.raises(ValueError, match="nf4_quantize_none"):
        _extension.C.nf4_quantize(
            src=w.data_ptr(), dtype=0, numel=64, blocksize=64, packed=w.data_ptr(),
            absmax=w.data_ptr(), variant="nf4_quantize_none", **_extension.launch_args(w),
        )  # fmt: skip


# --- empty and hostile arguments ------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_an_empty_tensor_is_quantised_and_restored(nested, device):
    codes, absmax, inner, offset = packed(0, 8, device, nested=nested)
    assert (codes.shape, absmax.shape) == ((0, 1), (0,))
    scales = {"nested_absmax": inner, "nested_offset": offset}
    assert ops.nf4_dequantize(codes, absmax, (0, 8), **scales).shape == (0, 8)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y = ops.nf4_linear(x, codes, absmax, out_features=0, **scales)
    assert y.shape == (3, 0)
    y.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize(("n", "k"), [(3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("m", [(5,), (2, 5), (0,), ()])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_layers_without_features_do_as_linear(nf4, m, n, k, device):
    x = torch.ones((*m, k), device=device, requires_grad=True)
    w = torch.zeros(n, k, device=device)
    bias, a, b = (torch.ones(s, device=device, requires_grad=True) for s in ((n,), (2, k), (n, 2)))
    codes, absmax = ops.nf4_quantize(w)
    scales = {"absmax": absmax} if nf4 else {}
    y = ops.lora_linear(x, codes if nf4 else w, a, b, scale=1.0, bias=bias, dropout=0.5, **scales)
    assert torch.equal(y, F.linear(x, w, bias))
    y.sum().backward()
    want = torch.autograd.grad(F.linear(x, w, bias).sum(), (x, bias))
    assert torch.equal(x.grad, want[0])
    assert torch.equal(bias.grad, want[1])
    assert not a.grad.any()
    assert not b.grad.any()
    plain = ops.nf4_linear(x, codes, absmax, bias.detach(), out_features=n)
    assert torch.equal(plain, F.linear(x, w, bias))
    assert torch.equal(torch.autograd.grad(plain.sum(), x)[0], want[0])


def test_adapters_without_features(device):
    x = torch.ones(2, 3, 0, device=device, requires_grad=True)
    down, up, none = (torch.zeros(s, device=device) for s in ((4, 0), (0, 4), (0,)))
    linear = ops.scaled_linear(x, down, none)
    assert linear.shape == (2, 3, 4)
    assert not linear.any()
    for y in (ops.adapter_scale(x, none), ops.adapter_bottleneck(x, down, up), linear):
        assert y is linear or y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_a_zero_block_under_nested_scales(device):
    """Its scale comes back near zero, not as zero: code 7 keeps the weights zero."""
    w = seeded((512 * 64,), seed=1, device=device)
    w[64:128] = 0
    codes, absmax = ops.nf4_quantize(w)
    scales = ops.nf4_nest(absmax)
    restored = ops.nf4_dequantize(
        codes, scales.codes, w.shape, torch.float32,
        nested_absmax=scales.absmax, nested_offset=scales.offset,
    )  # fmt: skip
    assert not restored[64:128].any()


@pytest.mark.parametrize(
    "op", ["nf4_linear", "lora_linear", "adapter_scale", "scaled_linear", "adapter_bottleneck"]
)
def test_a_scalar_input_is_refused(op):
    codes, absmax, _, _ = packed(4, 1, "cpu")
    one, x = torch.ones(1, 1), torch.tensor(1.0)
    calls = {
        "nf4_linear": lambda: ops.nf4_linear(x, codes, absmax, out_features=4),
        "lora_linear": lambda: ops.lora_linear(x, one, one, one, scale=1.0),
        "adapter_scale": lambda: ops.adapter_scale(x, one[0]),
        "scaled_linear": lambda: ops.scaled_linear(x, one, one[0]),
        "adapter_bottleneck": lambda: ops.adapter_bottleneck(x, one, one),
    }
    with pytest.raises(ValueError, match=f"{op}: x must have at least one dimension, got a scalar"):
        calls[op]()


def test_negative_sizes_whose_product_fits_are_refused():
    codes, absmax = torch.zeros(3, 1, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(
        ValueError, match=r"nf4_dequantize: shape must not be negative, got \[-2, -3\]"
    ):
        ops.nf4_dequantize(codes, absmax, (-2, -3))


@pytest.mark.parametrize("bad", [torch.int32, torch.bool, torch.complex64])
def test_other_element_types_are_refused(bad):
    x = torch.ones(4, 8).to(bad)
    codes, absmax, _, _ = packed(8, 8, "cpu")
    f = torch.ones(8, 8)
    calls = {
        "nf4_quantize: w": lambda: ops.nf4_quantize(x),
        "nf4_nest: absmax": lambda: ops.nf4_nest(x[0]),
        "nf4_linear: input": lambda: ops.nf4_linear(x, codes, absmax, out_features=8),
        "lora_linear: x": lambda: ops.lora_linear(x, f, f, f, scale=1.0),
        "adapter_scale: x": lambda: ops.adapter_scale(x, f[0]),
        "scaled_linear: x": lambda: ops.OPS["scaled_linear"].call(x, f, f[0], None),
    }
    for text, call in calls.items():
        with pytest.raises(TypeError, match=f"{text} must be .*float32.*, got {str(bad)[6:]}"):
            call()


# --- autocast and compilation ---------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_an_nf4_weight(x_dtype, adapter, low, device):
    codes, absmax, _, _ = packed(8, 16, device)
    x = seeded((3, 16), seed=1, dtype=x_dtype, device=device).requires_grad_()
    bias = seeded((8,), seed=4, device=device)
    a, b = (seeded(s, seed=2, dtype=adapter, device=device) for s in ((2, 16), (8, 2)))
    for enabled in (False, True):
        with torch.autocast(device, low, enabled=enabled):
            want = F.linear(x, torch.zeros(8, 16, dtype=x_dtype, device=device)).dtype
            plain = ops.nf4_linear(x, codes, absmax, bias.to(x_dtype), out_features=8)
            lora = ops.lora_linear(x, codes, a, b, scale=1.0, bias=bias, absmax=absmax)
        assert (plain.dtype, lora.dtype) == (want, want)
        for y in (plain, lora):
            (dx,) = torch.autograd.grad(y.float().sum(), x)
            assert dx.dtype == x_dtype


def _by_batch(device):
    """Functions of x [batch, 64] with other differentiable inputs."""
    _, codes, bias, a, b, scale, _, _, absmax, inner, offset, _ = lora_args(
        (5,), 12, 64, 3, device, torch.float32, nf4="nested", bias=True
    )
    nested = {"nested_absmax": inner, "nested_offset": offset}
    _, down, up, *_ = bottleneck_args(
        (5,), 64, 3, device, torch.float32, norm=False, biases=False, activation="gelu"
    )
    return {
        "nf4_linear": lambda x: ops.nf4_linear(x, codes, absmax, bias, out_features=12, **nested),
        "lora_linear": lambda x: ops.lora_linear(
            x, codes, a, b, scale=scale, bias=bias, absmax=absmax, **nested
        ),
        "lora_linear with dropout": lambda x: ops.lora_linear(
            x, codes, a, b, scale=scale, dropout=0.25, absmax=absmax, **nested
        ),
        "dropout": lambda x: ops.dropout(x, 0.25),
        "adapter_scale": lambda x: ops.adapter_scale(x, a[0]),
        "scaled_linear": lambda x: ops.scaled_linear(x, down.detach(), a[0]),
        "adapter_bottleneck": lambda x: ops.adapter_bottleneck(x, down, up),
    }


@pytest.mark.parametrize(
    "name",
    [
        "dropout",
        "nf4_linear",
        "lora_linear",
        "lora_linear with dropout",
        "adapter_scale",
        "scaled_linear",
        "adapter_bottleneck",
    ],
)
def test_one_compiled_graph_serves_every_batch(name, device):
    torch._dynamo.reset()
    function = _by_batch(device)[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 8, 3, 130):
        x = seeded((batch, 64), seed=batch, device=device).requires_grad_()
        results = []
        for call in (function, compiled):
            torch.manual_seed(batch)
            y = call(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert counter.frame_count <= 2  # one recompile at most
