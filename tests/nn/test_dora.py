# SPDX-License-Identifier: Apache-2.0
"""DoRA in one layer: row norms against fp64, forward and backward against PEFT's layer."""

import contextlib
import copy

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast import ops
from pyfast.errors import AdapterStateError, UnsupportedError
from pyfast.methods.lora import LoraLinear
from pyfast.nn import DenseWeight, NF4Linear, dora
from pyfast.testing import assert_accurate, seeded

N, K, R, SCALE = 40, 56, 3, 0.5


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows even in small weights."""
    monkeypatch.setattr(dora, "_CPU_BLOCK", 64)
    monkeypatch.setattr(dora, "_BLOCK", 64)
    monkeypatch.setattr("pyfast.ops.dora.CPU_BLOCK", 64)
    monkeypatch.setattr("pyfast.ops.dora.BLOCK", 64)


def factors(n, k, r=R, dtype=torch.float32, device="cpu"):
    a = seeded((r, k), seed=4, dtype=dtype, device=device, scale=k**-0.5)
    return a, seeded((n, r), seed=5, dtype=dtype, device=device, scale=0.3)


def exact_norms(matrix, a, b, scale=SCALE):
    total = matrix.double() + scale * b.double() @ a.double()
    return torch.linalg.vector_norm(total, dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_norms(dtype, transposed, autocast, small_blocks, device):
    matrix = seeded((37, 29), seed=1, dtype=dtype, device=device)
    stored = matrix.t().contiguous().t() if transposed else matrix
    a, b = factors(37, 29, dtype=torch.promote_types(dtype, torch.float32), device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        norms = dora.row_norms(DenseWeight(stored), a, b, SCALE)
    assert norms.dtype == a.dtype
    assert not norms.requires_grad
    torch.testing.assert_close(norms.double(), exact_norms(matrix, a, b), rtol=1e-6, atol=0)


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(300, 192), (513, 257), (3, 64), (16, 65536)])
def test_norms_of_nf4(n, k, nested, blocksize, small_blocks, device):
    linear = nn.Linear(k, n, device=device)
    weight = NF4Linear.from_weight(
        DenseWeight(linear.weight.data), blocksize=blocksize, nested=nested
    ).nf4_weight()
    a, b = factors(n, k, device=device)
    norms = dora.row_norms(weight, a, b, SCALE)
    exact = exact_norms(weight.dense(), a, b)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_norms_where_the_sum_nearly_cancels(left, small_blocks, device):
    a, b = factors(40, 64, device=device)
    update = SCALE * b.double() @ a.double()
    noise = seeded((40, 64), seed=7, dtype=torch.float64, device=device)
    matrix = (left * update.norm() / noise.norm() * noise - update).float()
    exact = exact_norms(matrix, a, b)
    assert (exact < 10 * left * matrix.double().norm(dim=1)).all()
    # Rounding s B A to float32 already moves what is left by 1e-7 of W.
    norms = dora.row_norms(DenseWeight(matrix), a, b, SCALE)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6 / left, atol=0)


class Largest(TorchDispatchMode):
    """The most elements that one result has which is no view."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("nf4", [False, True])
def test_norms_hold_one_block_at_a_time(nf4, small_blocks):
    linear = nn.Linear(128, 1024, dtype=torch.bfloat16)
    weight = DenseWeight(linear.weight.data)
    if nf4:
        weight = NF4Linear.from_weight(weight).nf4_weight()
    a, b = factors(1024, 128)
    with Largest() as largest:
        dora.row_norms(weight, a, b, SCALE)
    assert largest.elements <= (64 * 256 if nf4 else b.numel())


# --- the layer ----------------------------------------------------------------------------------


def base(kind="linear", dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "conv1d":
        layer = transformers.pytorch_utils.Conv1D(N, K)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(K, N, bias=kind == "linear")
    return layer.to(dtype).requires_grad_(False)


def pair(kind="linear", dtype=torch.float32, adapter=torch.float32, dropout=0.0):
    """Our layer and PEFT's over equal bases, with equal adapters after some training."""
    ours = LoraLinear(base(kind, dtype))
    ours.add("default", R, SCALE, dropout, False, adapter, True)
    ours.set_active(["default"])
    config = peft.LoraConfig(
        r=R, lora_alpha=R * SCALE, target_modules=["0"], use_dora=True, lora_dropout=dropout,
        fan_in_fan_out=kind == "conv1d",
    )  # fmt: skip
    theirs = peft.get_peft_model(nn.Sequential(base(kind, dtype)), config).base_model.model[0]
    with torch.no_grad():
        for i, (key, parameter) in enumerate(ours.named_parameters()):
            if "lora_" in key:
                noise = seeded(parameter.shape, seed=20 + i, scale=0.3)
                start = 1 + parameter if "magnitude" in key else 0
                parameter.copy_(start + noise)
                other = theirs.get_parameter(key)
                other.data = parameter.detach().to(adapter, copy=True)
    return ours, theirs


def results(layer, x, dy):
    """The output, and the gradients of x, A, B and m."""
    x = x.clone().requires_grad_()
    y = layer(x)
    parts = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    wanted = [x, *(part["default"].weight for part in parts)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_close(ours, theirs, tolerance=1e-5):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", [(2, 5), (1,)])
def test_equals_pefts_layer(kind, shape, dtype, tolerance):
    ours, theirs = pair(kind, dtype, dtype)
    x, dy = (seeded((*shape, size), seed=size, dtype=dtype) for size in (K, N))
    assert_close(results(ours, x, dy), results(theirs, x, dy), tolerance)
    with torch.no_grad():
        assert_close([ours(x)], [theirs(x)], tolerance)


class Mask(nn.Module):
    """A dropout whose result is given."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_equals_pefts(kind, hooked, monkeypatch):
    ours, theirs = pair(kind, dropout=0.4)
    ours.train(), theirs.train()
    x, dy = seeded((6, K), seed=1), seeded((6, N), seed=2)
    if hooked:
        ours.base_layer.register_forward_hook(lambda *args: None)
    draw = torch.nn.functional.dropout if hooked else ops.dropout
    torch.manual_seed(3)
    mask = draw(torch.ones(6, K), 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    theirs.lora_dropout["default"] = Mask(mask)
    torch.manual_seed(3)
    assert_close(results(ours, x, dy), results(theirs, x, dy))
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_hooks_on_each_part_run():
    ours, _ = pair()
    x, dy = seeded((6, K), seed=1), seeded((6, N), seed=2)
    expected = results(ours, x, dy)
    parts = [ours.base_layer, ours.lora_A, ours.lora_B, ours.lora_magnitude_vector]
    for part in parts:
        part = part["default"] if isinstance(part, nn.ModuleDict) else part
        seen = []
        handle = part.register_forward_hook(lambda *args, seen=seen: seen.append(1))
        assert_close(results(ours, x, dy), expected)
        assert seen == [1]
        handle.remove()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck(kind, dropout, monkeypatch):
    ours, _ = pair(kind, torch.float64, torch.float64, dropout)
    ours.train()
    norms = ours._norms("default")
    monkeypatch.setattr(dora, "row_norms", lambda *args: norms)  # constants to the gradient
    keys = [key for key, _ in ours.named_parameters() if "lora_" in key]
    assert len(keys) == 3

    def function(x, *parameters):
        torch.manual_seed(0)
        return torch.func.functional_call(ours, dict(zip(keys, parameters, strict=True)), x)

    x = seeded((4, K), seed=1, dtype=torch.float64).requires_grad_()
    leaves = [ours.get_parameter(key).detach().clone().requires_grad_() for key in keys]
    assert torch.autograd.gradcheck(function, (x, *leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_accuracy_rule(kind, dtype, device):
    ours, theirs = (layer.to(device) for layer in pair(kind, dtype, dtype))
    exact = pair(kind, torch.float64, torch.float64)[0].to(device)
    with torch.no_grad():
        for key, parameter in exact.named_parameters():
            parameter.copy_(ours.get_parameter(key).double())
    x = seeded((200, K), seed=1, dtype=dtype, device=device)
    dy = seeded((200, N), seed=2, dtype=dtype, device=device)
    true = results(exact, x.double(), dy.double())
    rough = results(theirs, x, dy)
    found = results(ours, x, dy)
    with torch.no_grad():
        assert torch.equal(ours(x), found[0])
    for mine, plain, right in zip(found, rough, true, strict=True):
        assert mine.dtype == plain.dtype
        assert_accurate(mine, plain, right)


def test_what_is_kept_for_the_backward():
    ours, _ = pair("no bias")
    x, kept = seeded((50, K), seed=1).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x)
    long = [tuple(t.shape) for t in kept if t.shape[0] == 50]
    assert sorted(long) == [(50, 8), (50, N), (50, K)]  # z, the product before scaling, x


def test_a_caller_may_change_the_result_in_place():
    ours, theirs = pair()
    x, dy = seeded((6, K), seed=1), seeded((6, N), seed=2)
    for layer in (ours, theirs):
        layer.forward_of = layer.forward
        layer.forward = lambda x, layer=layer: layer.forward_of(x).mul_(2).relu_()
    assert_close(results(ours, x, dy), results(theirs, x, dy))


def test_rows_of_zeros_stay_finite():
    layer = base()
    layer.weight[1:3] = 0
    ours = LoraLinear(layer)
    ours.add("default", R, SCALE, 0.0, True, torch.float32, True)
    ours.set_active(["default"])
    x, dy = seeded((6, K), seed=1), seeded((6, N), seed=2)
    assert torch.equal(ours(x), layer(x))
    assert all(torch.isfinite(t).all() for t in results(ours, x, dy))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "no bias", "nf4"])
def test_compiled_without_graph_breaks(kind, dropout, small_blocks):
    ours, _ = pair("no bias" if kind == "nf4" else kind, dropout=dropout)
    if kind == "nf4":
        ours.base_layer = NF4Linear.from_weight(ours.base_weight)
    ours.train()
    x, dy = seeded((6, K), seed=1), seeded((6, N), seed=2)
    torch.manual_seed(0)
    expected = results(ours, x, dy)
    compiled = copy.deepcopy(ours)
    torch._dynamo.reset()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    found = results(compiled, x, dy)
    if dropout == 0.0:
        assert_close(found, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["base_layer", "lora_A"])
def test_parts_that_cannot_be_read_are_refused(where):
    ours, _ = pair()
    x = seeded((6, K), seed=1)
    error = contextlib.nullcontext()
    if where == "base_layer":
        forward = ours.base_layer.forward
        ours.base_layer.forward = lambda x: forward(x)
        error = pytest.raises(AdapterStateError, match="is not a linear layer that can be read")
    else:
        ours.lora_A["default"].register_forward_hook(lambda *args: args[1][0][..., :R])
        ours.lora_A["default"].to("meta")
        error = pytest.raises(UnsupportedError, match="'default' lies on the meta device")
    with error:
        ours(x)


def offload(module):
    accelerate.cpu_offload(module, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_offloading_of_the_parts(kind):
    """The weight and the factors are read to have the norms; the magnitudes are only multiplied with."""
    ours, _ = pair("no bias" if kind == "nf4" else kind)
    if kind == "nf4":
        ours.base_layer = NF4Linear.from_weight(ours.base_weight)
    x = seeded((6, K), seed=1)
    expected = ours(x)
    refused = {
        ours.base_layer: (
            AdapterStateError,
            "leave this layer out of the offloading. DoRA, merging",
        ),
        ours.lora_B["default"]: (UnsupportedError, "leave adapters on their device"),
    }
    for part, (error, text) in refused.items():
        offload(part)
        with pytest.raises(error, match=text):
            ours(x)
        accelerate.hooks.remove_hook_from_module(part)
        torch.testing.assert_close(ours(x), expected)
    offload(ours.lora_magnitude_vector["default"])
    assert ours.lora_magnitude_vector["default"].weight.is_meta
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("kind", ["linear", "no bias"])
def test_autocast_gives_its_dtype(kind):
    ours, theirs = pair(kind)
    x = seeded((6, K), seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
        with torch.no_grad():
            assert torch.equal(ours(x), y)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), theirs(x), atol=0.05, rtol=0.05)
