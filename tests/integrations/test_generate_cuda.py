# SPDX-License-Identifier: Apache-2.0
"""4-bit generation on a GPU inside transformers' own loop, and captured in a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

import pyfast
from pyfast import ops
from pyfast.nn import NF4Linear
from tests.models import llama, randomise, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="kernels for sm_90a",
    ),
]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "layers": 2}


def models(adapter):
    """A 4-bit model and its dense twin in float64, with what bitsandbytes would dequantise."""
    model = pyfast.quantize(llama(**SIZES).bfloat16()).cuda()
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, NF4Linear):
            weight = pyfast.nn.weight_of(module).dense(torch.bfloat16)
            dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda")
            dense.weight = torch.nn.Parameter(weight.double())
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, dense)
    if adapter:
        config = pyfast.LoraConfig(r=8, target_modules="all-linear")
        for each in (model, twin):
            randomise(pyfast.apply(each, config))
    return model.eval(), twin.double().eval()


def few_rows(ran):
    return [name for op, name in ran if op == "nf4_linear"]


@pytest.mark.parametrize("adapter", [False, True])
def test_generate_reads_the_packed_bytes(adapter):
    model, twin = models(adapter)
    ids = token_ids(2, 8).cuda()
    with ops.recorded_kernels() as ran, torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert set(few_rows(ran)) <= {"nf4_few_rows_mma_sm90", "nf4_few_rows_wgmma_sm90"}
    assert len(few_rows(ran)) == 8 * 14  # seven linears of two layers for each token
    with torch.no_grad():
        exact = twin(out.sequences[:, :-1]).logits[:, 7:]
    got = torch.stack(out.logits, dim=1).double()
    assert (got - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("adapter", [False, True])
def test_few_tokens_in_a_cuda_graph(adapter):
    model, _ = models(adapter)
    held = token_ids(1, 5).cuda()

    def forward():
        return model(held, use_cache=False).logits

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with ops.recorded_kernels() as ran, torch.cuda.graph(graph):
            captured = forward()
        assert set(few_rows(ran)) == {"nf4_few_rows_mma_sm90"}
        for seed in (1, 2):
            held.copy_(token_ids(1, 5).roll(seed))
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, forward())
