# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows: kernel names, streams, graph capture, sizes beyond 2^31."""

from __future__ import annotations

import pytest
import torch

from pyfast import ops
from pyfast.testing import seeded
from tests.cases import lora_args, packed

pytestmark = pytest.mark.gpu
SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not SM90, reason="kernels for sm_90a")
def test_the_cuda_kernels_serve():
    w = seeded((64, 256), seed=1, dtype=torch.bfloat16, device="cuda")
    x = seeded((4, 256), seed=2, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with ops.recorded_kernels() as ran:
        codes, absmax = ops.nf4_quantize(w)
        scales = ops.nf4_nest(absmax)
        nested = {"nested_absmax": scales.absmax, "nested_offset": scales.offset}
        ops.nf4_linear(x, codes, scales.codes, out_features=64, **nested).sum().backward()
    names = [name for _, name in ran]
    assert names == [
        "nf4_quantize_cuda",
        "nf4_nest_cuda",
        "nf4_few_rows_mma_sm90",
        "nf4_linear_scratch",
        "nf4_dequantize_cuda",
    ]


def test_launches_are_ordered_on_a_side_stream():
    w = seeded((512, 1024), seed=1, dtype=torch.bfloat16)
    expected = ops.nf4_quantize(w)
    values = ops.nf4_dequantize(*expected, (512, 1024))
    stream = torch.cuda.Stream()
    for _ in range(20):
        source = torch.zeros_like(w, device="cuda")
        ready = w.cuda()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            source.copy_(ready)
            codes, absmax = ops.nf4_quantize(source)
            got = ops.nf4_dequantize(codes, absmax, (512, 1024))
        stream.synchronize()
        assert torch.equal(got.cpu(), values)


def capture(step):
    """A graph of `step` after the usual warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.parametrize("nf4", [None, "flat", "nested"])
def test_a_captured_step_equals_eager(nf4):
    x, w, t, a, b, scale, _, _, absmax, inner, offset, _ = lora_args(
        (32,), 64, 128, 8, "cuda", torch.bfloat16, nf4=nf4, bias=True
    )
    parts = {"absmax": absmax, "nested_absmax": inner, "nested_offset": offset}

    def step():
        y = ops.lora_linear(x, w, a, b, scale=scale, bias=t, **parts)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, a, b))]

    graph, captured = capture(step)
    for seed in range(5):
        with torch.no_grad():
            x.copy_(seeded(x.shape, seed=seed, dtype=x.dtype))
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


def test_dropout_draws_anew_in_every_replay():
    x, w, _, a, b, *_ = lora_args((64,), 64, 128, 8, "cuda", torch.float32)

    def step():
        return ops.lora_linear(x, w, a, b, scale=1.0, dropout=0.5)

    graph, captured = capture(step)
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert not torch.equal(first, captured)


@pytest.mark.parametrize("nested", [False, True])
def test_unaligned_pointers(nested):
    codes, absmax, inner, offset = packed(65, 64, "cuda", nested=nested)
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(
        codes[:, 0]
    )
    scales = {"nested_absmax": inner, "nested_offset": offset}
    expected = ops.nf4_dequantize(codes, absmax, (65, 64), **scales)
    assert torch.equal(ops.nf4_dequantize(shifted, absmax, (65, 64), **scales), expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    numel = (1 << 31) + 64
    w = torch.empty(numel, dtype=torch.bfloat16, device="cuda").normal_()
    codes, absmax = ops.nf4_quantize(w)
    scales = ops.nf4_nest(absmax)
    got = ops.nf4_dequantize(
        codes, scales.codes, (numel,), nested_absmax=scales.absmax, nested_offset=scales.offset
    )
    tail = 256 * 64 * 4
    start = (numel - tail) // (256 * 64) * (256 * 64)
    block = start // 64
    expected = ops.nf4_dequantize(
        codes[start // 2 :], scales.codes[block:], (numel - start,),
        nested_absmax=scales.absmax[block // 256 :], nested_offset=scales.offset,
    )  # fmt: skip
    assert torch.equal(got[start:], expected)
    assert torch.equal(ops.nf4_quantize(w[start:])[0], codes[start // 2 :])
    assert (got[:: 1 << 20].float() - w[:: 1 << 20].float()).abs().max() < 0.7
