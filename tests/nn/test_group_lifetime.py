# SPDX-License-Identifier: Apache-2.0
"""Groups of layers: no output outlives its use, and copies, replicas and threads do not meet."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pyfast.nn.group import InputGroup, form_groups
from pyfast.ops import _accumulate
from pyfast.ops.lora_group import _LoraGroup
from tests.nn.test_group import Trio, close, inputs, plain, served


def waiting(trio):
    """The outputs that wait, weakly."""
    found = [] if trio.q.input_group._kept is None else trio.q.input_group._kept.outputs.values()
    return [weakref.ref(y) for y, *_ in found]


def test_what_is_never_taken_is_dropped():
    trio = Trio()
    x = inputs() * 1
    first = trio.q(x)
    refs = waiting(trio)
    assert len(refs) == 2
    first.sum().backward()
    assert not any(ref() is not None for ref in refs)  # by the backward
    with torch.no_grad():
        trio.q(x)
        refs = waiting(trio)
        del x
        assert not any(ref() is not None for ref in refs)  # by the end of the input
    x = inputs()
    trio.q(x)
    refs = waiting(trio)
    with torch.no_grad():
        trio(inputs(2), "k")
    assert not any(ref() is not None for ref in refs)  # by the next input in another state
    refs = waiting(trio)
    group = weakref.ref(trio.q.input_group)
    del trio
    gc.collect()
    assert group() is None
    assert not any(ref() is not None for ref in refs)  # by the end of the model


def test_a_step_leaves_no_output():
    trio, x = Trio(), inputs()
    first = trio.q(x)
    refs = [weakref.ref(first), *waiting(trio)]
    (first.sum() + sum(y.sum() for y in trio(x, "kv"))).backward()
    del first
    assert trio.q.input_group._kept is None
    assert not any(ref() is not None for ref in refs)


@pytest.mark.parametrize("first", ["q", "v"])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_member_may_have_a_backward_of_its_own(first, frozen):
    trio, (x, y) = Trio(), (inputs(grad=False), inputs(2))
    if frozen:  # then its output has no derivative
        trio.q.requires_grad_(False)
    for each in (x, y):
        names = first + "qkv".replace(first, "")
        pairs = zip(trio(each, names), plain(trio, each, names), strict=True)
        for mine, theirs in pairs:
            if not mine.requires_grad:
                continue
            got, want = [], []
            for output, into in ((mine, got), (theirs, want)):
                trio.zero_grad()
                y.grad = None
                output.square().sum().backward()
                into.extend(p.grad for p in [y, *trio.parameters()] if p.grad is not None)
            close(got, want)


def test_a_second_backward_of_one_member_needs_the_graph_to_be_retained():
    trio, x = Trio(), inputs()
    got, want = [], []
    for call, into in ((trio, got), (lambda *args: plain(trio, *args), want)):
        trio.zero_grad()
        x.grad = None
        q, k, v = (y.sum() for y in call(x, "qkv"))  # a sum saves nothing that could be freed
        q.backward(retain_graph=True)
        q.backward()
        k.backward()
        for freed in (q, k):
            with pytest.raises(RuntimeError, match="through the graph a second time"):
                freed.backward(inputs=[x])
        v.backward(retain_graph=True)
        v.backward()
        into.extend(p.grad.clone() for p in [x, *trio.parameters()] if p.grad is not None)
    close(got, want)


def test_a_derivative_of_an_input_that_was_detached_between_two_members():
    trio, leaf = Trio(), inputs()
    x = leaf * 2
    trio.q(x)
    x.detach_().requires_grad_()
    trio.k(x).sum().backward()
    (want,) = torch.autograd.grad(plain(trio, x, "k")[0].sum(), x)
    torch.testing.assert_close(x.grad, want)
    assert leaf.grad is None


# --- forwards that die between two members ----------------------------------------------------------


def abandoned(trio):
    """Weakly the input of a forward that died after its first member, and what came before it."""
    first = inputs()
    x = torch.tanh(first)
    trio.q(x)
    return [weakref.ref(x), weakref.ref(first)]


def alive(refs):
    gc.collect()
    return [ref() is not None for ref in refs]


def test_an_abandoned_forward_ends_with_the_next_ones_first_groups():
    layers = [Trio() for _ in range(3)]
    refs = abandoned(layers[2])
    assert all(alive(refs))
    outputs = [layer(inputs(seed)) for seed, layer in enumerate(layers[:2])]
    assert not any(alive(refs))
    _, ran = served(lambda: layers[2](inputs()))
    assert ran == ["group"]
    for seed, (layer, ys) in enumerate(zip(layers, outputs, strict=False)):
        close(ys, plain(layer, inputs(seed)))


def test_an_abandoned_forward_of_the_only_group():
    trio, x = Trio(), inputs(2)
    refs = abandoned(trio)
    ys = trio(x)
    close(ys, plain(trio, x))
    assert not any(alive(refs))
    ys, ran = served(lambda: trio(x))
    assert ran == ["group"]
    close(ys, plain(trio, x))


def test_two_models_may_take_turns():
    trio, other, x = Trio(), Trio(), inputs()
    for _ in range(2):
        got, ran = served(lambda: [trio.q(x), other.q(x), *trio(x, "kv"), *other(x, "kv")])
        assert ran == ["group"] * 2
        close(got, [y for order in ("q", "q", "kv", "kv") for y in plain(trio, x, order)])


# --- members that share a factor, ensembles ---------------------------------------------------------


def test_kernels_add_no_gradient_of_a_factor_that_two_members_share(monkeypatch):
    """Their way past torch, with the composition in place of a kernel."""
    trio, forward = Trio(), _LoraGroup.forward

    def direct(ctx, *args):
        outputs = forward(ctx, *args)
        ctx.direct = True
        return outputs

    monkeypatch.setattr(_LoraGroup, "forward", staticmethod(direct))
    trio.k.lora_A["default"].weight = trio.q.lora_A["default"].weight
    factors = [p for p in trio.parameters() if p.requires_grad]
    for factor in factors:
        _accumulate.mark(factor, True)
    want = [torch.zeros_like(factor) for factor in factors]
    for seed in range(3):
        x = inputs(seed)
        sum(y.square().sum() for y in trio(x)).backward()
        grads = torch.autograd.grad(sum(y.square().sum() for y in plain(trio, x)), factors)
        want = [total + grad for total, grad in zip(want, grads, strict=True)]
        close([factor.grad for factor in factors], want)


@pytest.mark.parametrize("names", ["q", "qkv"])
def test_an_ensemble_of_factors(names):
    trio, x = Trio().requires_grad_(False), inputs(grad=False)
    state = {name: torch.stack([p, 2 * p]) for name, p in trio.named_parameters()}

    trio.q(x)  # whose company waits, of other factors
    got = torch.func.vmap(lambda values: functional_call(trio, values, (x, names)))(state)
    for i in range(2):
        each = copy.deepcopy(trio)
        each.load_state_dict({name: values[i] for name, values in state.items()})
        close([y[i] for y in got], plain(each, x, names))


# --- copies, replicas, threads ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_groups_of_their_own(make):
    trio, x = Trio(), inputs()
    keys = list(trio.state_dict())
    trio.q(x)
    other = make(trio)
    assert list(other.state_dict()) == keys
    assert other.q.input_group is not trio.q.input_group
    assert other.q.input_group is other.v.input_group
    with torch.no_grad():
        other.k.lora_B["default"].weight.add_(1)
    ys, ran = served(lambda: other(x))
    assert ran == ["group"]
    close(ys, plain(other, x))
    ys, ran = served(lambda: trio(x, "kv"))
    assert ran == []  # what it kept before it was copied
    close(ys, plain(trio, x, "kv"))
    alone = make(trio.v)
    close([alone(x)], plain(trio, x, "v"))
    assert alone.extra_repr() == ""


def test_shallow_copies_and_replicas_stay_out():
    trio, x = Trio(), inputs(grad=False)
    for other in (copy.copy(trio.q), trio.q._replicate_for_data_parallel()):
        if "lora_A" not in other._modules:  # a replica is given its modules by its maker
            other._modules = dict(trio.q._modules)
        assert other.input_group is trio.q.input_group
        y, ran = served(lambda other=other: other(x))
        assert ran == ["linear"]
        close([y], plain(trio, x, "q"))
    _, ran = served(lambda: trio(x))
    assert ran == ["group"]


def test_threads_get_their_own_outputs():
    trio, failures = Trio(), []
    gate = threading.Barrier(4)

    def work(seed):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        want = plain(trio, x)
        gate.wait()
        with torch.no_grad():
            for _ in range(200):
                if not all(
                    torch.allclose(a, b, atol=1e-5) for a, b in zip(trio(x), want, strict=True)
                ):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_layer_in_two_sets_stays_alone():
    trio, other = Trio(), Trio()
    other.q = trio.q
    for layer in (*trio.children(), *other.children()):
        layer.input_group = None
    form_groups([dict(trio.named_children()), dict(other.named_children())])
    assert not any(isinstance(m.input_group, InputGroup) for m in (trio.q, trio.k, other.v))
    form_groups([{"q": trio.q, "k": nn.Linear(2, 2)}, {"a": trio.v, "b": trio.v}])
    assert trio.q.input_group is None
    assert trio.v.input_group is None
