# SPDX-License-Identifier: Apache-2.0
"""Inputs of lora_linear that its backward makes again: same gradients, nothing kept, and when not."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.autograd import graph
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyfast import ops
from pyfast.errors import UnsupportedError
from pyfast.ops import _remake
from pyfast.ops.lora_group import lora_group
from pyfast.testing import seeded

SHAPE, K, N, R = (2, 3, 40), 40, 24, 4


class LigerSiLUMulFunction(torch.autograd.Function):
    """As Liger's: keeps the factors, and writes their gradients over them."""

    @staticmethod
    def forward(ctx, a, b, gate_multiplier=1.0, down_multiplier=1.0):
        shape = a.shape
        a, b = a.view(-1, shape[-1]), b.view(-1, shape[-1])
        ctx.save_for_backward(a, b)
        ctx.gate_multiplier, ctx.down_multiplier = gate_multiplier, down_multiplier
        return (F.silu(a * gate_multiplier) * b * down_multiplier).view(shape)

    @staticmethod
    def backward(ctx, grad):
        a, b = (t.detach() for t in ctx.saved_tensors)
        with torch.enable_grad():
            leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
            h = F.silu(leaves[0] * ctx.gate_multiplier) * leaves[1] * ctx.down_multiplier
            grads = torch.autograd.grad(h, leaves, grad.view(h.shape))
        a.data.copy_(grads[0])
        b.data.copy_(grads[1])
        return a.view(grad.shape), b.view(grad.shape), None, None


def torch_product(gate, up):
    return F.silu(gate) * up


def fused_product(gate, up):
    return LigerSiLUMulFunction.apply(gate.clone(), up.clone(), 0.5, 3.0)


PRODUCTS = {"torch": torch_product, "liger": fused_product}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(_remake, "LEAST", 1)
    monkeypatch.setattr(LigerSiLUMulFunction, "__module__", "liger_kernel.ops.swiglu")


def inputs(device="cpu", dtype=torch.float32):
    shapes = (SHAPE, SHAPE, (N, K), (R, K), (N, R))
    gate, up, w, a, b = (
        seeded(shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)
    )
    return [t.requires_grad_() for t in (gate, up, a, b)], w


def down(h, w, a, b):
    return ops.lora_linear(h, w, a, b, scale=2.0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_gradients_are_those_of_a_kept_input(kind, dropout, device, monkeypatch):
    grads = []
    for least in (1, 1 << 62):
        monkeypatch.setattr(_remake, "LEAST", least)
        leaves, w = inputs(device)
        torch.manual_seed(0)
        h = PRODUCTS[kind](*leaves[:2])
        y = ops.lora_linear(h, w, *leaves[2:], scale=2.0, dropout=dropout)
        assert (y.grad_fn.saved_tensors[0] is None) is (least == 1)
        y.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for made, kept in zip(*grads, strict=True):
        assert torch.equal(made, kept)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_product_is_freed_once_nobody_holds_it(kind):
    leaves, w = inputs()
    h = PRODUCTS[kind](*leaves[:2])
    y = down(h, w, *leaves[2:])
    alive = weakref.ref(h)
    del h
    assert alive() is None
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def kept(h, w, leaves):
    return down(h, w, *leaves[2:]).grad_fn.saved_tensors[0] is not None


def test_what_cannot_be_made_again_is_kept():
    leaves, w = inputs()
    gate, up = leaves[:2]
    assert kept(gate, w, leaves)
    assert kept((gate * up).view(6, K), w, leaves)
    assert kept(gate + up, w, leaves)
    assert kept(gate * up.detach(), w, leaves)
    assert kept(gate * up[..., :1], w, leaves)
    assert kept(gate * 2.0, w, leaves)
    h = gate * up
    with torch.no_grad():
        h.add_(1.0)
    assert kept(h, w, leaves)
    assert not kept(gate * up, w, leaves)


def test_a_product_whose_graph_is_freed_is_kept():
    leaves, w = inputs()
    h = leaves[0] * leaves[1]
    h.sum().backward()
    assert torch.equal(down(h, w, *leaves[2:]), down(h.detach(), w, *leaves[2:]))


def test_small_inputs_are_kept(monkeypatch):
    monkeypatch.setattr(_remake, "LEAST", 6 * K + 1)
    leaves, w = inputs()
    assert kept(leaves[0] * leaves[1], w, leaves)


def test_saved_tensor_hooks_get_the_input():
    leaves, w = inputs()
    expected = torch.autograd.grad(down(torch_product(*leaves[:2]), w, *leaves[2:]).sum(), leaves)
    with graph.save_on_cpu():
        y = down(torch_product(*leaves[:2]), w, *leaves[2:])
    assert y.grad_fn.saved_tensors[0] is not None
    for made, want in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert torch.equal(made, want)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="torch tells of no hooks"
)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_hooks_of_the_product_alone(kind):
    leaves, w = inputs()
    expected = torch.autograd.grad(down(PRODUCTS[kind](*leaves[:2]), w, *leaves[2:]).sum(), leaves)
    h = checkpoint(PRODUCTS[kind], *leaves[:2], use_reentrant=False)
    made = torch.autograd.grad(down(h, w, *leaves[2:]).sum(), leaves)
    for one, want in zip(made, expected, strict=True):
        assert torch.equal(one, want)
    unpacked = []
    with graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        h = PRODUCTS[kind](*leaves[:2])
    assert kept(h, w, leaves)
    assert not unpacked


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    leaves, w = inputs()
    expected = torch.autograd.grad(down(torch_product(*leaves[:2]), w, *leaves[2:]).sum(), leaves)

    def block(gate, up):
        return down(torch_product(gate, up), w, *leaves[2:])

    checkpoint(block, *leaves[:2], use_reentrant=reentrant).sum().backward()
    for leaf, want in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, want)


def test_compiled():
    leaves, w = inputs()
    expected = torch.autograd.grad(down(torch_product(*leaves[:2]), w, *leaves[2:]).sum(), leaves)
    block = torch.compile(
        lambda: down(torch_product(*leaves[:2]), w, *leaves[2:]).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    for made, want in zip(torch.autograd.grad(block(), leaves), expected, strict=True):
        torch.testing.assert_close(made, want)


def test_torchs_product_serves_two_backwards():
    leaves, w = inputs()
    y = down(torch_product(*leaves[:2]), w, *leaves[2:]).sum()
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(y, leaves), strict=True):
        assert torch.equal(one, two)


def test_a_second_backward_through_ligers_product_is_refused():
    leaves, w = inputs()
    y = down(fused_product(*leaves[:2]), w, *leaves[2:]).sum()
    y.backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match="second backward through a product of Liger's"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 8), (5, 40), (2, 2056), (7, 30)])
def test_a_norm_is_rounded_twice(shape, dtype, device):
    x = seeded(shape, seed=1, dtype=dtype, device=device)
    weight = seeded(shape[1:], seed=2, dtype=dtype, device=device)
    inverse = seeded(shape[:1], seed=3, device=device).abs()
    expected = (x.float() * inverse[:, None]).to(dtype).float() * weight.float()
    assert torch.equal(_remake._normed(x, weight, inverse), expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ligers_norm_ahead_of_a_group(dtype, monkeypatch):
    norm = pytest.importorskip("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    x = seeded(SHAPE, seed=1, dtype=dtype, device="cuda").requires_grad_()
    weight = seeded((K,), seed=2, dtype=dtype, device="cuda")
    w, a, b = (
        [seeded(shape, seed=3 + i, dtype=dtype, device="cuda") for i in range(2)]
        for shape in ((N, K), (R, K), (N, R))
    )
    a = [t.requires_grad_() for t in a]
    grads = []
    for least in (1, 1 << 62):
        monkeypatch.setattr(_remake, "LEAST", least)
        normed = norm.apply(x, weight, 1e-5)
        ys = lora_group(normed, w, a, b, scales=[2.0, 2.0])
        assert (ys[0].grad_fn.saved_tensors[0] is None) is (least == 1)
        if least == 1:
            assert torch.equal(ys[0].grad_fn.remake(), normed)
            assert _remake.recipe(normed) is None  # a layer alone keeps it
        grads.append(torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *a]))
    for made, want in zip(*grads, strict=True):
        assert torch.equal(made, want)
    for other in ({"offset": 1.0}, {"casting_mode": "gemma"}):
        y = lora_group(norm.apply(*(x, weight, 1e-5), *_rest(other)), w, a, b, scales=[2.0, 2.0])
        assert y[0].grad_fn.saved_tensors[0] is not None


def _rest(options):
    return options.get("offset", 0.0), options.get("casting_mode", "llama")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LigerSiLUMulFunction", "LigerGELUMulFunction"])
def test_ligers_own_products(name, monkeypatch):
    liger = pytest.importorskip("liger_kernel.transformers.functional")
    module = "swiglu" if "SiLU" in name else "geglu"
    assert liger  # the package's own import order
    function = getattr(pytest.importorskip(f"liger_kernel.ops.{module}"), name)
    grads = []
    for least in (1, 1 << 62):
        monkeypatch.setattr(_remake, "LEAST", least)
        leaves, w = inputs("cuda", torch.bfloat16)
        y = down(function.apply(leaves[0].clone(), leaves[1].clone()), w, *leaves[2:])
        assert (y.grad_fn.saved_tensors[0] is None) is (least == 1)
        y.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for made, kept_ in zip(*grads, strict=True):
        assert torch.equal(made, kept_)
