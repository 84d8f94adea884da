# SPDX-License-Identifier: Apache-2.0
"""Eager calls go past torch's dispatcher, and only where it would find nothing but the kernel."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pyfast import ops
from pyfast.errors import UnsupportedError
from pyfast.ops import OPS, _library
from pyfast.testing import seeded
from tests.cases import CASES, packed
from tests.ops.conftest import dispatched

CALLS = [case for case in CASES if OPS[case.op].differentiable]
ran: list[str] = []


def memory(tensor):
    """The float32 values at the tensor's address, as a compiled kernel reads them."""
    cells = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return torch.frombuffer(cells, dtype=torch.float32) if tensor.numel() else torch.empty(0)


def probe_fake(x, y, factor):
    if x.dim() != 1:
        raise ValueError(f"eager_probe: x must have one dimension, got {list(x.shape)}")
    return x.new_empty(x.shape)


def probe_kernel(x, y, factor):
    out = probe_fake(x, y, factor)
    ran.append("kernel")
    _library.record("eager_probe", "eager_probe_kernel")
    memory(out).copy_(memory(x) * factor + (0 if y is None else memory(y)))
    return out


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, x, y, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return below(x, y, factor)

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert x.dim() == 1
        grad_x = probe(grad.contiguous(), None, ctx.factor)
        return None, grad_x, grad if ctx.needs_input_grad[2] else None, None


probe = _library.define(
    "eager_probe(Tensor x, Tensor? y, float factor) -> Tensor",
    fake=probe_fake,
    reference=lambda x, y, factor: x * factor + (0 if y is None else y),
    kernel=probe_kernel,
    devices=("CPU",),
    autograd=Probe,
)
PROBE = OPS.pop("eager_probe")  # the table is of the package's own ops


def operands(y=True):
    x = torch.randn(5, requires_grad=True)
    return x, torch.randn(5, requires_grad=True) if y else None, 3.0


# --- the direct way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [True, False])
def test_plain_tensors_skip_the_dispatcher_in_both_directions(y):
    x, y, factor = operands(y)
    with ops.recorded_kernels() as names:
        out, seen = dispatched(lambda: probe(x, y, factor))
        torch.testing.assert_close(out, x * factor + (0 if y is None else y))
        leaves = [leaf for leaf in (x, y) if leaf is not None]
        grads, seen_back = dispatched(lambda: torch.autograd.grad(out.sum(), leaves))
    assert seen == seen_back == set()
    assert names == [("eager_probe", "eager_probe_kernel")] * 2
    assert torch.equal(grads[0], torch.full((5,), factor))
    assert dispatched(lambda: PROBE.overload(x, y, factor))[1] == {"pyfast::eager_probe"}


def test_without_gradients():
    x, y, factor = operands()
    with torch.inference_mode():
        made = torch.randn(5)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            for left in (x, made):
                out, seen = dispatched(lambda left=left: probe(left, y, factor))
                assert seen == set()
                assert not out.requires_grad
                assert out.is_inference() == (guard is torch.inference_mode)
                assert torch.equal(out, left * factor + y)


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_every_op_gives_what_the_dispatcher_gives(case, device):
    op = OPS[case.op]

    def run(call):
        args = [
            arg.detach().clone().requires_grad_(arg.requires_grad)
            if isinstance(arg, torch.Tensor)
            else arg
            for arg in case.make(device, torch.float32)
        ]
        out, seen = dispatched(lambda: call(*args))
        out = out[0] if isinstance(out, tuple) else out
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        grads, back = dispatched(lambda: torch.autograd.grad(out.square().sum(), leaves))
        return [out, *grads], seen | back

    (direct, seen), (through, seen_through) = run(op.call), run(op.overload)
    assert seen == set()
    assert f"pyfast::{case.op}" in seen_through
    for got, want in zip(direct, through, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_graph_used_again_and_twice():
    x, y, factor = operands()
    out = probe(x, y, factor)
    first = torch.autograd.grad(out.sum(), (x, y), retain_graph=True)
    second = torch.autograd.grad((out + probe(out, y, factor)).sum(), (x, y))
    assert torch.equal(first[0], torch.full((5,), factor))
    assert torch.equal(second[0], torch.full((5,), factor + factor * factor))


def test_what_is_saved_is_watched():
    x, y, factor = operands()
    inner = x * 1
    out = probe(inner, y, factor)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        probe(x, y, factor)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_kernel_again(reentrant):
    x, y, factor = operands()
    ran.clear()
    out = checkpoint(lambda x: probe(x, y, factor), x, use_reentrant=reentrant)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((5,), factor))
    assert ran == ["kernel"] * 3  # forward, forward again, backward


def test_a_second_derivative_is_refused():
    x, y, factor = operands()
    (grad,) = torch.autograd.grad(probe(x, y, factor).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- everything else goes through the dispatcher ----------------------------------------------------


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op():
    x, y, factor = operands()
    with Watch() as watch:
        out = probe(x, y, factor)
        out.sum().backward()
    assert watch.seen.count("pyfast.eager_probe.default") == 2
    assert torch.equal(x.grad, torch.full((5,), factor))


class WatchFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen: list[object] = []


class Named(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_profilers_see_the_op_in_both_directions():
    x, w, a, b = (torch.randn(s, requires_grad=True) for s in ((5, 8), (6, 8), (2, 8), (6, 2)))
    with torch.profiler.profile(record_shapes=True) as profile:
        ops.lora_linear(x, w, a, b, scale=1.0).sum().backward()
    seen = {e.key: e for e in profile.key_averages(group_by_input_shape=True)}
    assert seen["pyfast::lora_linear"].input_shapes[:2] == [[5, 8], [6, 8]]
    assert seen["pyfast::lora_linear_backward"].input_shapes[:2] == [[5, 6], [5, 8]]


def test_function_modes_and_subclasses_see_the_op():
    x, y, factor = operands()
    seen.clear()
    with WatchFunctions():
        probe(x, y, factor)
    assert PROBE.overload in seen
    for args in ((x.as_subclass(Named), y, factor), (x, y.as_subclass(Named), factor)):
        seen.clear()
        assert isinstance(probe(*args), Named)
        assert PROBE.overload in seen


def test_fake_tensors_run_no_kernel():
    x, y, factor = operands()
    mode = FakeTensorMode()
    ran.clear()
    fakes = [mode.from_tensor(t.detach()) for t in (x, y)]
    outside = probe(*fakes, factor)
    with mode:
        inside = probe(*fakes, factor)
    assert ran == []
    assert type(outside).__name__ == type(inside).__name__ == "FakeTensor"


def test_compiles_into_one_graph_with_the_op():
    x, y, factor = operands()
    graphs = []

    def backend(module, inputs):
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: probe(x, y, factor) * 2, fullgraph=True, backend=backend)
    out = compiled(x)
    out.sum().backward()
    assert any("pyfast.eager_probe.default" in graph for graph in graphs)
    assert torch.equal(x.grad, torch.full((5,), 2 * factor))


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_a_trace_holds_the_op():
    x, y, factor = operands()
    traced = torch.jit.trace(lambda x, y: probe(x, y, factor), (x.detach(), y.detach()))
    assert "pyfast::eager_probe" in str(traced.graph)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # torch scripts its formulas
def test_transforms_are_refused_as_ever():
    x, y, factor = operands()
    y = y.detach()
    calls = {
        "grad": lambda op: torch.func.grad(lambda x: op(x, y, factor).sum())(x.detach()),
        "jvp": lambda op: torch.func.jvp(lambda x: op(x, y, factor), (y,), (y,)),
    }
    for call in calls.values():
        for op in (probe, PROBE.overload):
            with pytest.raises(UnsupportedError, match="serves neither forward-mode"):
                call(op)
    for op in (probe, PROBE.overload):
        with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="neither forward-mode"):
            op(forward_ad.make_dual(x.detach(), y), y, factor)


def test_vmap_does_as_the_dispatcher():
    batch = torch.randn(3, 5)
    for op in (probe, PROBE.overload):
        out = torch.func.vmap(lambda x, op=op: op(x, None, 2.0))(batch)
        assert torch.equal(out, batch * 2)


def test_a_lazily_negated_tensor_is_made_first():
    lazy = torch.randn(5, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    assert torch.equal(probe(lazy, None, 2.0), lazy.clone() * 2)
    codes, absmax, _, _ = packed(8, 8, "cpu")
    lazy = torch.randn(4, 8, dtype=torch.complex64).conj().imag
    got, want = (ops.nf4_linear(x, codes, absmax, out_features=8) for x in (lazy, lazy.clone()))
    assert torch.equal(got, want)


def test_tensors_that_a_transform_left_behind():
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(torch.ones(5))
    assert torch.equal(probe(left[0], None, 2.0), torch.full((5,), 2.0))


def test_a_device_without_kernels():
    meta = torch.empty(5, device="meta")
    ran.clear()
    assert probe(meta, None, 2.0).device.type == "meta"
    assert ran == []


@pytest.mark.parametrize("args", [("x", None, 1.0), (torch.ones(5), 2, 1.0)])
def test_arguments_of_the_wrong_kind_are_refused_by_the_schema(args):
    texts = []
    for op in (probe, PROBE.overload):
        with pytest.raises(RuntimeError, match="eager_probe") as caught:
            op(*args)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# --- plans ------------------------------------------------------------------------------------------


def test_a_plan_is_made_once_for_each_signature():
    made = []
    plan = _library.planned(lambda *args: made.append(args))
    x = torch.zeros(4, 6)
    same = [x, torch.ones(4, 6), torch.zeros(4, 6, requires_grad=True)]
    others = [x.t(), x.t().contiguous().t(), x[:, :3], x.double(), x[1:], x.to("meta"), None]
    for tensor in same:
        plan(tensor, 1.0, "dense")
    assert len(made) == 1
    for tensor in others:
        plan(tensor, 1.0, "dense")
    plan(x, 2.0, "dense")
    plan(x, 1.0, None)
    assert len(made) == 3 + len(others)
    unaligned = torch.zeros(25)[1:].view(4, 6)
    plan(unaligned, 1.0, "dense")
    assert len(made) == 4 + len(others)


def test_a_plan_that_raised_is_made_again():
    calls = []

    @_library.planned
    def plan(value):
        calls.append(value)
        if len(calls) == 1:
            raise ValueError("first")
        return len(calls)

    with pytest.raises(ValueError, match="first"):
        plan(1)
    assert [plan(1), plan(1)] == [2, 2]


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(_library, "_MOST_PLANS", 8)
    made = []
    plan = _library.planned(made.append)
    for value in (*range(20), *range(12, 20)):
        plan(value)
    assert len(made) == 20 + 4  # the second walk finds 16 to 19, which came after the last clearing


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_may_be_changed_in_place(shape, grad, device):
    x = seeded(shape, seed=1, device=device)
    w, a, b = (seeded(s, seed=2, device=device) for s in ((16, 16), (4, 16), (16, 4)))
    weights = a.requires_grad_(grad), b.requires_grad_(grad)
    calls = {
        "lora_linear": lambda: ops.lora_linear(x, w, *weights, scale=1.0),
        "adapter_bottleneck": lambda: ops.adapter_bottleneck(x, *weights),
    }
    for name, call in calls.items():
        expected = call().detach().relu()
        with torch.set_grad_enabled(grad):
            y = call()
        torch.testing.assert_close(y.relu_().detach(), expected, msg=name)
        if grad:
            y.sum().backward()


def test_recorders_of_equal_contents_nest():
    with ops.recorded_kernels() as outer:
        with ops.recorded_kernels() as inner:
            pass
        ops.lora_linear(
            torch.ones(2, 4), torch.ones(4, 4), torch.ones(1, 4), torch.ones(4, 1), scale=1.0
        )
    assert inner == []
    assert outer == [("lora_linear", "reference")]
