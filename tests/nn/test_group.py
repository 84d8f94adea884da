# SPDX-License-Identifier: Apache-2.0
"""Layers that are computed together: when they are, and when they are not."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from pyfast import ops
from pyfast.errors import UnsupportedError
from pyfast.methods.lora import LoraLinear
from pyfast.nn import NF4Linear, disband_groups, weight_of
from pyfast.nn.group import form_groups

F = torch.nn.functional
OUT = {"q": 12, "k": 8, "v": 8}


class Trio(nn.Module):
    def __init__(self, dropout=0.0, scales=(2.0, 2.0, 2.0), dtype=torch.float32, rank=3):
        super().__init__()
        torch.manual_seed(0)
        for (name, n), scale in zip(OUT.items(), scales, strict=True):
            layer = LoraLinear(
                nn.Linear(16, n, bias=name == "k", dtype=dtype).requires_grad_(False)
            )
            layer.add("default", rank, scale, dropout, False, dtype)
            layer.set_active(["default"])
            self.add_module(name, layer)
        form_groups([dict(self.named_children())])

    def forward(self, x, order="qkv"):
        return [getattr(self, name)(x) for name in order]


def plain(trio, x, order="qkv"):
    """The formula, in torch."""
    ys = []
    for name in order:
        layer = getattr(trio, name)
        (adapter,) = layer.active
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        ys.append(y + layer.scaling[adapter] * F.linear(F.linear(x, a), b))
    return ys


def served(call):
    """The call's result and the ops of ours that ran."""
    with ops.recorded_kernels() as ran:
        result = call()
    return result, [op.removeprefix("lora_") for op, _ in ran]


def inputs(seed=1, dtype=torch.float32, grad=True):
    torch.manual_seed(seed)
    return torch.randn(2, 5, 16, dtype=dtype, requires_grad=grad)


def close(got, want):
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def kept(trio):
    """Names of the layers that outputs wait for."""
    found = trio.q.input_group._kept
    return [] if found is None else list(found.outputs)


def leaves(trio, x):
    return [x, *(p for p in trio.parameters() if p.requires_grad)]


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv", "qk", "qkqv", "qkvqkv", "q"])
@pytest.mark.parametrize("grad", [True, False])
def test_members_in_any_order_and_number(order, grad):
    trio, x = Trio(), inputs()
    with torch.set_grad_enabled(grad):
        ys, ran = served(lambda: trio(x, order))
        close(ys, plain(trio, x, order))
    assert ran == ["group"] * {"qkqv": 2, "qkvqkv": 2}.get(order, 1)
    assert sorted(kept(trio)) == sorted({"qk": "v", "q": "kv", "qkqv": "k"}.get(order, ""))
    if grad:
        used = leaves(trio, x)
        got, want = (
            torch.autograd.grad(sum(y.square().sum() for y in each), used, allow_unused=True)
            for each in (ys, plain(trio, x, order))
        )
        for mine, theirs in zip(got, want, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs, atol=1e-4)
        assert kept(trio) == []


def test_one_member_twice_in_one_graph():
    trio, x = Trio(dtype=torch.float64), inputs(dtype=torch.float64)

    def twice(call):
        q, k, v = call(x)
        (again,) = call(F.pad(q * k.sum() + v.sum(), (0, 4)), "q")
        return torch.autograd.grad(again.square().sum(), leaves(trio, x))

    close(twice(lambda *args: plain(trio, *args)), twice(trio))


# --- what makes a member compute its own ------------------------------------------------------------


def in_place(trio, x):
    with torch.no_grad():
        x.add_(1)


def data(trio, x):
    x.data = x.data + 1


def factor(trio, x):
    with torch.no_grad():
        trio.k.lora_B["default"].weight.add_(1)


def another_weight(trio, x):
    trio.k.base_layer.weight.data = trio.k.base_layer.weight.data + 1


def bias(trio, x):
    trio.k.base_layer.bias = nn.Parameter(torch.ones(8))


def scale(trio, x):
    trio.k.scaling["default"] = 3.0


@pytest.mark.parametrize("change", [in_place, data, factor, another_weight, bias, scale])
def test_a_change_between_two_members_is_seen(change):
    trio, x = Trio(), inputs(grad=False)
    with torch.no_grad():
        trio.q(x)
        change(trio, x)
        close([trio.k(x), trio.v(x)], plain(trio, x, "kv"))


def test_another_tensor_with_the_same_values_is_another_input():
    trio, x = Trio(), inputs()
    (_, _), ran = served(lambda: (trio.q(x), trio.k(x.clone())))
    assert ran == ["group", "linear"]
    assert kept(trio) == ["k", "v"]


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_that_take_turns(grad):
    """One of them is computed for together, instead of each for all members at each call."""
    trio, (x, y, z) = Trio(), (inputs(seed) for seed in range(3))
    with torch.set_grad_enabled(grad):
        calls = [(name, each) for name in "qkv" for each in (x, y, z)]
        got, ran = served(lambda: [getattr(trio, name)(each) for name, each in calls])
        close(got, [plain(trio, each, name)[0] for name, each in calls])
    # Those of x are taken one by one; the last of y has nothing to wait for.
    assert ran == ["group", *["linear"] * 4, "group", "linear"]
    with torch.no_grad():
        y.add_(1)  # what waits for it can never be taken
    assert served(lambda: trio(x))[1] == ["group"]


@pytest.mark.parametrize("inside", [0, 1])
def test_inference_mode_for_one_of_the_members(inside):
    trio, x = Trio(), inputs(grad=False)
    ys = []
    with torch.no_grad():
        for i, layer in enumerate((trio.q, trio.k)):
            with torch.inference_mode(i == inside):
                ys.append(layer(x))
    close(ys, plain(trio, x, "qk"))
    assert [y.is_inference() for y in ys] == [i == inside for i in range(2)]


def test_groups_can_be_switched_off():
    trio, x = Trio(), inputs()
    trio.q(x)
    disband_groups(trio)
    ys, ran = served(lambda: trio(x))
    assert ran == ["linear"] * 3
    close(ys, plain(trio, x))
    assert trio.q.extra_repr() == ""
    form_groups([dict(trio.named_children())])
    assert served(lambda: trio(x))[1] == ["group"]


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_that_change_between_two_members(mode):
    trio, x = Trio(), inputs()
    trio.q(x)
    with mode():
        mine, theirs = trio.k(x), plain(trio, x, "k")[0]
        assert mine.dtype == F.linear(x, trio.k.base_layer.weight).dtype
    assert mine.requires_grad == theirs.requires_grad
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)
    y = trio.v(x)
    assert y.dtype == torch.float32
    assert y.requires_grad


def test_gradients_wanted_after_the_first_member():
    trio, x = Trio(), inputs(grad=False)
    trio.q(x)
    x.requires_grad_()
    (got,) = torch.autograd.grad(trio.k(x).sum(), x)
    (want,) = torch.autograd.grad(plain(trio, x, "k")[0].sum(), x)
    torch.testing.assert_close(got, want)


def test_inference_mode_tensors_are_served_one_by_one():
    trio = Trio()
    with torch.inference_mode():
        x = torch.randn(2, 16)
        first = trio.q(x)
        x.add_(1)
        close(trio(x, "kv"), plain(trio, x, "kv"))
    assert first.is_inference()
    with torch.inference_mode():
        trio, x = Trio(), inputs(grad=False)
    with torch.no_grad():
        ys, ran = served(lambda: trio(x.clone()))
        close(ys, plain(trio, x))
    assert ran == ["linear"] * 3


def test_a_compiled_model_has_linears_in_its_graph():
    trio, x, targets = Trio(), inputs(), []

    def backend(module, example):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    close(torch.compile(trio, fullgraph=True, backend=backend)(x), plain(trio, x))
    assert sum("lora_linear" in target for target in targets) == 3
    assert not any("lora_group" in target for target in targets)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_traced_and_mapped_models():
    trio, x = Trio().requires_grad_(False), inputs(grad=False)
    traced = torch.jit.trace(lambda x: tuple(trio(x)), x)
    close(traced(x + 1), plain(trio, x + 1))
    close(torch.func.vmap(lambda x: tuple(trio(x)))(x), plain(trio, x))
    with pytest.raises(UnsupportedError, match="neither forward-mode"):
        torch.func.grad(lambda x: trio(x)[0].sum())(x)
    assert kept(trio) == []


@pytest.mark.parametrize("where", ["", ".base_layer", ".lora_A.default", ".lora_B.default"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["q", "v"])
def test_a_hooked_member_computes_its_own(name, kind, where):
    trio, x, seen = Trio(), inputs(), []
    hooked = trio.get_submodule(name + where)
    getattr(hooked, f"register_{kind}_hook")(lambda module, *args: seen.append(args))
    ys, ran = served(lambda: trio(x))
    close(ys, plain(trio, x))
    sum(y.sum() for y in ys).backward()
    assert len(seen) == 1
    assert ran.count("group") == 1
    assert ran.count("linear") == (where == "")
    if kind == "full_backward" and not where:  # what reaches the input through this layer alone
        (got,) = seen[0][0]
        (want,) = torch.autograd.grad(plain(trio, x, name)[0].sum(), x)
        torch.testing.assert_close(got, want)


def test_hooks_on_all_modules_see_every_call():
    trio, x, seen = Trio(), inputs(), []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        _, ran = served(lambda: trio(x))
    finally:
        handle.remove()
    assert ran == ["linear"] * 3
    assert seen[-1] is trio


def test_members_that_are_no_plain_product():
    x = inputs(grad=False)
    cases = {}
    for what in ("disabled", "merged", "several", "inactive", "quantised", "replaced", "made"):
        trio = cases[what] = Trio()
        if what == "disabled":
            trio.k.disable()
        elif what == "merged":
            with torch.no_grad():
                trio.k.merge(["default"], None)
        elif what == "several":
            trio.k.add("b", 2, 1.0, 0.0, False, torch.float32)
            trio.k.set_active(["default", "b"])
        elif what == "inactive":
            trio.k.set_active([])
        elif what == "quantised":
            trio.k.base_layer = NF4Linear.from_weight(weight_of(trio.k.base_layer))
        elif what == "replaced":
            trio.k.base_layer.forward = partial(nn.Linear.forward, trio.k.base_layer)
        else:
            parametrize.register_parametrization(trio.k.lora_A["default"], "weight", nn.Identity())
    for trio in cases.values():
        layer, group = trio.k, trio.k.input_group
        got, ran = served(lambda trio=trio: trio(x))
        assert ran.count("group") == 1
        assert ran.count("linear") <= 1
        layer.input_group = None
        torch.testing.assert_close(got[1], layer(x))
        close([got[0], got[2]], plain(trio, x, "qv"))
        layer.input_group = group
        assert trio.q.extra_repr() == "group=q+v"
        assert trio.k.extra_repr() == ""


def test_what_does_not_fit_together():
    x = inputs(grad=False)
    trio = Trio(scales=(2.0, 1.0, 2.0))
    ys, ran = served(lambda: trio(x))
    close(ys, plain(trio, x))
    assert sorted(ran) == ["group", "linear"]
    trio = Trio()
    trio.v.double()
    with torch.no_grad():
        close(trio(x, "qk"), plain(trio, x, "qk"))
    with pytest.raises(TypeError, match="lora_linear: x is float32 and weight float64"):
        trio.v(x)


def test_dropout_is_drawn_by_each_member():
    trio, x = Trio(dropout=0.5), inputs()
    ys, ran = served(lambda: trio(x))
    assert "group" not in ran
    assert not torch.allclose(ys[0], plain(trio, x)[0])
    trio.eval()
    ys, ran = served(lambda: trio(x))
    assert ran == ["group"]
    close(ys, plain(trio, x))
    trio.q.train()
    _, ran = served(lambda: trio.k(x))
    assert ran == ["group"]
    assert kept(trio) == ["v"]


# --- checkpointing ----------------------------------------------------------------------------------


def squashed(call, x, names):
    """What saves tensors besides the layers, of the same shapes."""
    return tuple(torch.tanh(y) for y in call(x, names))


def regions(call, reentrant):
    def outside(x, names):
        return squashed(call, x, names)

    def inside(x, names):
        return checkpoint(lambda x: squashed(call, x, names), x, use_reentrant=reentrant)

    return {
        "all": lambda x: inside(x, "qkv"),
        "first outside": lambda x: [*outside(x, "q"), *inside(x, "kv")],
        "last outside": lambda x: [*inside(x, "qk"), *outside(x, "v")],
        "each": lambda x: [y for name in "qkv" for y in inside(x, name)],
        "one inside": lambda x: [*outside(x, "q"), *inside(x, "k"), *outside(x, "v")],
    }


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("region", regions(None, False))
def test_checkpointed_regions_that_cut_a_group(region, reentrant):
    trio, x = Trio(), inputs()
    inner = x * 2
    ys = regions(trio, reentrant)[region](inner)
    want = squashed(lambda *args: plain(trio, *args), inner, "qkv")
    close(ys, want)
    got, expected = [], []
    for each, into in ((ys, got), (want, expected)):
        trio.zero_grad()
        x.grad = None
        sum((i + 1) * y.square().sum() for i, y in enumerate(each)).backward(retain_graph=True)
        into.extend(leaf.grad.clone() for leaf in leaves(trio, x))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
