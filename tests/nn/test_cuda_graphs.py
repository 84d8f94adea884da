# SPDX-License-Identifier: Apache-2.0
"""Training steps in CUDA graphs: one captured whole, and those of torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear, weight_of
from pyfast.ops import _scratch
from pyfast.testing import seeded

pytestmark = [
    pytest.mark.gpu,
    # torch's own, about streams of gradients and about matrix products that could be less exact.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
# Of the first torch makes the products, of the second on sm_90a our GEMM, which makes z in the workspace.
SHAPES = pytest.mark.parametrize(("rows", "width"), [(64, 256), (1100, 2056)])
STEPS = 6


def network(width, nf4):
    """Three LoRA layers and what is between them, in bfloat16 with adapters in float32."""
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        base = nn.Linear(width, width, dtype=torch.bfloat16).requires_grad_(False)
        base = NF4Linear.from_weight(weight_of(base)) if nf4 else base
        layer = LoraLinear(base)
        layer.add("default", 8, 1.0, 0.0, False, torch.float32)
        layer.set_active(["default"])
        layers += [layer, nn.SiLU()]
    return nn.Sequential(*layers).cuda()


def twins(width, nf4):
    """Two equal models with an optimiser each."""
    model = network(width, nf4)
    pairs = []
    for each in (model, copy.deepcopy(model)):
        trained = [p for p in each.parameters() if p.requires_grad]
        assert len(trained) == 6
        pairs.append((each, torch.optim.AdamW(trained, lr=1e-3, capturable=True)))
    return pairs


def inputs(rows, width, step):
    return seeded((rows, width), seed=10 + step, dtype=torch.bfloat16, device="cuda")


def loss_of(model, x):
    return (model(x).float() - 1).square().mean()


def train(model, optimizer, x, keep_grads=False):
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_grads)
    return loss.detach()


def compare(model, peer, start):
    """The two moved alike; Adam makes whole steps of roundings where a gradient is next to nothing."""
    moved = dict(model.named_parameters())
    for name, want in peer.named_parameters():
        if want.requires_grad:
            got = moved[name]
            assert (want - start[name]).abs().mean() > STEPS * 2e-4
            assert (got - want).abs().mean() < STEPS * 1e-4, name


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def no_kept_buffers(monkeypatch):
    """Whatever ran before, the buffers are made within the test."""
    torch.cuda.synchronize()
    monkeypatch.setattr(_scratch, "_buffers", {})
    monkeypatch.setattr(_scratch, "_workspaces", {})


@KINDS
@SHAPES
def test_a_whole_step_captured(rows, width, nf4):
    (model, optimizer), (peer, other) = twins(width, nf4)
    x, start = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda"), parameters(peer)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(2):
            x.copy_(inputs(rows, width, step))
            train(model, optimizer, x, keep_grads=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(model, optimizer, x, keep_grads=True)
    for step in range(2):
        train(peer, other, inputs(rows, width, step))
    for step in range(2, STEPS):
        x.copy_(inputs(rows, width, step))
        graph.replay()
        # Eager steps, of which these make the kept buffers grow, go between the replays.
        loss_of(peer, inputs(step * rows, width, step)).backward()
        other.zero_grad()
        torch.testing.assert_close(captured, train(peer, other, inputs(rows, width, step)),
                                   rtol=1e-3, atol=0)  # fmt: skip
    compare(model, peer, start)


@KINDS
@SHAPES
def test_compiled_with_graphs(rows, width, nf4):
    from torch._dynamo.utils import counters
    from torch._inductor import cudagraph_trees

    torch._dynamo.reset()
    counters.clear()
    (model, optimizer), (peer, other) = twins(width, nf4)
    compiled, start = torch.compile(model, mode="reduce-overhead", fullgraph=True), parameters(peer)
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        x = inputs(rows, width, step)
        got = train(compiled, optimizer, x).clone()
        loss_of(peer, inputs((step + 1) * rows, width, step)).backward()
        other.zero_grad()
        torch.testing.assert_close(got, train(peer, other, x), rtol=1e-2, atol=0)
    compare(model, peer, start)
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = cudagraph_trees.get_manager(0, create_if_none_exists=False)
    assert manager is not None
    assert manager.new_graph_id().id >= 2  # one of the forward and one of the backward
