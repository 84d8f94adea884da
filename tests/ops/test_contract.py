# SPDX-License-Identifier: Apache-2.0
"""The contract that every op keeps, run over the op table."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import ops
from pyfast.ops import OPS
from tests.cases import CASES, bottleneck_args, lora_args, packed

DIFFERENTIABLE = [case for case in CASES if OPS[case.op].differentiable]
PAIRS = [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in CASES for dtype in case.dtypes]


def first_output(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, device):
    torch.library.opcheck(OPS[case.op].overload, case.make(device, torch.float32))


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_the_fake_tells_the_truth(case, dtype, device):
    args = case.make(device, dtype)
    real = OPS[case.op].overload(*args)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in plain]
        fake = OPS[case.op].overload(*fake_args)
    pairs = zip(
        real if isinstance(real, (tuple, list)) else (real,),
        fake if isinstance(fake, (tuple, list)) else (fake,),
        strict=True,
    )
    for got, told in pairs:
        assert (got.shape, got.dtype, got.stride()) == (told.shape, told.dtype, told.stride())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_match_finite_differences(case):
    args = case.make("cpu", torch.float64)
    leaves = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    wide = [a.detach().double().requires_grad_() if i in leaves else a for i, a in enumerate(args)]

    def run(*inputs):
        values = list(wide)
        for i, value in zip(leaves, inputs, strict=True):
            values[i] = value
        return first_output(OPS[case.op].overload(*values))

    assert torch.autograd.gradcheck(run, [wide[i] for i in leaves])


@pytest.mark.parametrize("case", [c for c in DIFFERENTIABLE if c.name != "empty"], ids=str)
def test_double_backward_is_refused(case):
    args = case.make("cpu", torch.float32)
    y = first_output(OPS[case.op].overload(*args))
    (grad,) = torch.autograd.grad((y * y).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_exist_exactly_where_they_are_wanted(case):
    args = case.make("cpu", torch.float32)
    leaves = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        values = list(args)
        for i, want in zip(leaves, wanted, strict=True):
            values[i] = args[i].detach().clone().requires_grad_(want)
        y = first_output(OPS[case.op].overload(*values))
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()
        for i, want in zip(leaves, wanted, strict=True):
            grad = values[i].grad
            assert (grad is not None) == want
            if want:
                assert grad.shape == args[i].shape


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(case, dynamic):
    args = case.make("cpu", torch.float32)
    leaves = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]

    def run(*values):
        return first_output(OPS[case.op].overload(*values)) * 2

    def grads(function):
        values = list(args)
        for i in leaves:
            values[i] = args[i].detach().clone().requires_grad_()
        y = function(*values)
        y.sum().backward()
        return [y.detach(), *(values[i].grad for i in leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, expected in zip(grads(compiled), grads(run), strict=True):
        torch.testing.assert_close(got, expected)


def _public_calls(device):
    """Public functions with their inputs, for layouts that a raw case does not have."""
    x, w, t, a, b, scale, _, _, *_ = lora_args((6,), 12, 16, 3, device, torch.float32, bias=True)
    codes, absmax, _, _ = packed(12, 16, device)
    _, down, up, *_ = bottleneck_args(
        (6,), 16, 3, device, torch.float32, norm=False, biases=False, activation="silu"
    )
    return x, {
        "lora_linear": lambda x: ops.lora_linear(x, w, a, b, scale=scale, bias=t),
        "nf4_linear": lambda x: ops.nf4_linear(x, codes, absmax, t, out_features=12),
        "adapter_scale": lambda x: ops.adapter_scale(x, a[0]),
        "scaled_linear": lambda x: ops.scaled_linear(x, w, a[0], t),
        "adapter_bottleneck": lambda x: ops.adapter_bottleneck(x, down, up),
    }


@pytest.mark.parametrize(
    "op", ["lora_linear", "nf4_linear", "adapter_scale", "scaled_linear", "adapter_bottleneck"]
)
def test_any_input_layout_gives_the_contiguous_answer(op, device):
    x, calls = _public_calls(device)
    call = calls[op]
    x = x.detach()
    wide = torch.full((6, 40), float("nan"), device=device)
    wide[:, 3:35:2] = x
    layouts = {
        "transposed": x.t().contiguous().t(),
        "strided inside NaN": wide[:, 3:35:2],
        "expanded": x[:1].expand(4, 16),
        "three axes": x.view(2, 3, 16).transpose(0, 1),
    }
    for name, layout in layouts.items():
        leaf = layout.detach().requires_grad_()
        plain = layout.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        grad = torch.randn(call(plain).shape, device=device)
        # A gradient with strides of zero, as sum() and expand() produce.
        for dy in (grad, grad[..., :1].expand_as(grad)):
            y, expected = call(leaf), call(plain)
            torch.testing.assert_close(y, expected, msg=name)
            (got,) = torch.autograd.grad(y, leaf, dy)
            (want,) = torch.autograd.grad(expected, plain, dy)
            torch.testing.assert_close(got, want, msg=name)


def test_a_public_function_compiles_with_dropout():
    x, w, _, a, b, *_ = lora_args((6,), 12, 16, 3, "cpu", torch.float32)

    def step(x):
        return ops.lora_linear(x, w, a, b, scale=1.0, dropout=0.5)

    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert not torch.equal(y, ops.lora_linear(x, w, a, b, scale=1.0))


def test_the_extension_is_built():
    from pyfast import _extension

    assert _extension.C is not None, _extension.reason
