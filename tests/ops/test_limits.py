# SPDX-License-Identifier: Apache-2.0
"""What the ops do not serve is refused in a sentence: other derivatives, scalars; and meta, and forks."""

from __future__ import annotations

import os
import threading
import weakref

import pytest
import torch

from pyfast import ops
from pyfast.errors import UnsupportedError
from pyfast.ops import OPS, _scratch
from pyfast.ops.lora_group import lora_group
from tests.cases import CASES, packed

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.*:DeprecationWarning"  # torch scripts its forward-mode formulas
)
FIRST = {case.op: case for case in reversed(CASES) if OPS[case.op].differentiable}


@pytest.mark.parametrize("op", FIRST)
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "dual", "grad", "jacrev"])
def test_derivatives_that_would_be_zero_or_fail_inside_torch_are_refused(op, transform):
    x, *rest = (
        arg.detach() if isinstance(arg, torch.Tensor) else arg
        for arg in FIRST[op].make("cpu", torch.float32)
    )

    def total(x):
        y = OPS[op].overload(x, *rest)
        return (y[0] if isinstance(y, tuple) else y).sum()

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            total(torch.autograd.forward_ad.make_dual(x, x))

    calls = {
        "jvp": lambda x: torch.func.jvp(total, (x,), (x,)),
        "jacfwd": torch.func.jacfwd(total),
        "dual": dual,
        "grad": torch.func.grad(total),
        "jacrev": torch.func.jacrev(total),
    }
    with pytest.raises(UnsupportedError, match=rf"pyfast\.{op} serves neither forward-mode"):
        calls[transform](x)


def test_constants_of_a_transform_are_served():
    x, t, scale = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    constant = ops.adapter_scale(x, scale)
    _, tangent = torch.func.jvp(lambda y: y * ops.adapter_scale(x, scale), (x,), (t,))
    assert torch.equal(tangent, t * constant)
    gradient = torch.func.grad(lambda y: (y * ops.adapter_scale(x, scale)).sum())(x)
    assert torch.equal(gradient, constant)


def calls_of_every_op():
    w, a, b, codes = torch.zeros(8, 16), torch.zeros(4, 16), torch.zeros(8, 4), packed(8, 16, "cpu")
    magnitude, two = torch.ones(8), [None] * 2
    nf4 = {"absmax": codes[1], "blocksize": 64}
    return {
        "lora_linear": lambda x: ops.lora_linear(x, w, a, b, scale=1.0),
        "lora_linear with dropout": lambda x: ops.lora_linear(x, w, a, b, scale=1.0, dropout=0.5),
        "lora_linear over NF4": lambda x: ops.lora_linear(x, codes[0], a, b, scale=1.0, **nf4),
        "lora_group": lambda x: lora_group(
            x, [w, w], [a, a], [b, b], scales=[1.0, 1.0], biases=two
        ),
        "nf4_linear": lambda x: ops.nf4_linear(x, *codes[:2], out_features=8),
        "dora_linear": lambda x: ops.dora_linear(x, w, a, b, magnitude, magnitude, scale=1.0),
        "adapter_scale": lambda x: ops.adapter_scale(x, torch.ones(16)),
        "scaled_linear": lambda x: ops.scaled_linear(x, w, torch.ones(16)),
        "adapter_bottleneck": lambda x: ops.adapter_bottleneck(x, a, a.t()),
        "dropout": lambda x: ops.dropout(x, 0.5),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("op", calls_of_every_op())
def test_nested_tensors(op, layout):
    rows = [torch.ones(2, 16), torch.ones(3, 16)]
    call, state = calls_of_every_op()[op], torch.get_rng_state()
    for wanted in (False, True):
        x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=wanted)
        with pytest.raises(
            UnsupportedError, match=r"does not take nested tensors\. Fix: "
        ) as caught:
            call(x)
        assert str(caught.value).startswith(f"[PF016] pyfast.{op.split()[0]} does")
    assert torch.equal(torch.get_rng_state(), state)
    call(torch.cat(rows))


def test_nested_tensors_while_compiling():
    call = calls_of_every_op()["lora_linear"]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager")
    x = torch.nested.nested_tensor([torch.ones(2, 16), torch.ones(3, 16)], layout=torch.jagged)
    with pytest.raises(Exception, match="does not take nested tensors"):
        compiled(x)
    assert compiled(torch.ones(2, 16)).shape == (2, 8)


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 4)])
def test_factors_that_are_no_matrices(shape):
    x, wrong, matrix = torch.zeros(2, 4), torch.zeros(shape), torch.zeros(4, 4)
    for name, a, b in (("lora_A", wrong, matrix), ("lora_B", matrix, wrong)):
        with pytest.raises(ValueError, match=f"{name} must have two dimensions"):
            ops.lora_linear(x, matrix, a, b, scale=1.0)
    with pytest.raises(ValueError, match="down must have two dimensions"):
        ops.adapter_bottleneck(x, wrong, matrix)


def test_bias_of_a_norm_that_is_not_there():
    matrix = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="norm_bias needs norm_weight"):
        ops.adapter_bottleneck(torch.zeros(2, 4), matrix, matrix, norm_bias=torch.ones(4))


@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors_give_shapes(autocast):
    x, w, a, b = (torch.empty(s, device="meta") for s in ((2, 3, 8), (6, 8), (4, 8), (6, 4)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.lora_linear(x, w, a, b, scale=1.0, dropout=0.5)
        assert (y.shape, y.dtype) == ((2, 3, 6), torch.nn.functional.linear(x, w).dtype)
        assert ops.adapter_bottleneck(x, a, a.t()).shape == x.shape


def kept(numel):
    """The buffer that serves `numel` elements, weakly."""
    like = torch.zeros(1, dtype=torch.float64)
    _scratch.scratch(numel, like)
    return weakref.ref(_scratch._buffers[like.device, like.dtype, 0])


def test_a_kept_buffer_is_freed_ahead_of_a_larger_one(monkeypatch):
    """Else the two of them would be in memory at once, which is where a large model runs out of it."""
    monkeypatch.setattr(_scratch, "_buffers", {})
    empty, alive = torch.empty, []
    first = kept(8)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: alive.append(first()) or empty(*a, **k))
    assert kept(8) is first
    assert kept(9)().numel() == 9
    assert alive == [None]


def test_kept_buffers_do_not_come_from_the_pool_of_the_thread_that_asks(monkeypatch):
    """As `torch.cuda.use_mem_pool` and the warm-up of CUDA graph trees set one for their own thread."""
    monkeypatch.setattr(_scratch, "_buffers", {})
    empty, threads = torch.empty, []

    def noting(*args, **options):
        threads.append(threading.get_ident())
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", noting)
    with torch.inference_mode():
        assert not kept(8)().is_inference()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_of_a_fork_while_a_thread_computes():
    """The thread that holds the lock does not exist in the child."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with _scratch.scratch_lock:
            held.set()
            done.wait()

    _scratch.scratch(8, torch.zeros(1))
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        free = _scratch.scratch_lock.acquire(timeout=5)
        os._exit(0 if free and not _scratch._buffers else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0
    assert _scratch._buffers
