# SPDX-License-Identifier: Apache-2.0
"""lora_group: accuracy against float64 and the plain composition, every gradient, and the op's contract."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfast import ops
from pyfast.errors import QuantStateError
from pyfast.ops import OPS
from pyfast.ops.lora_group import lora_group
from pyfast.testing import assert_accurate, seeded
from tests.cases import packed
from tests.ops.conftest import dispatched

F = torch.nn.functional
K = 130
OUT, RANKS, SCALES = (72, 40, 24), (16, 3, 100), (2.0, 2.0, 2.0)


def operands(count=3, m=(7,), dtype=torch.float32, adapter=None, device="cpu", biases=True):
    """x, then the W_i, A_i, B_i and bias_i; all require gradients."""
    adapter = adapter or dtype

    def leaf(shape, seed, dtype, scale=1.0):
        made = seeded(shape, seed=seed, dtype=dtype, device=device, scale=scale)
        return made.requires_grad_()

    x = leaf((*m, K), 1, dtype)
    w = [leaf((n, K), 10 + n, dtype, K**-0.5) for n in OUT[:count]]
    a = [leaf((r, K), 20 + r, adapter, K**-0.5) for r in RANKS[:count]]
    sizes = zip(OUT[:count], RANKS[:count], strict=True)
    b = [leaf((n, r), 30 + r, adapter, r**-0.5) for n, r in sizes]
    t = [leaf((n,), 40 + n, dtype) for n in OUT[:count]] if biases else [None] * count
    return x, w, a, b, t


def flat(x, w, a, b, t):
    return [leaf for leaf in (x, *w, *a, *b, *t) if leaf is not None]


def composition(x, w, a, b, t, scales):
    """The plain layers."""
    parts = zip(w, a, b, t, scales, strict=True)
    return [
        F.linear(x, w_nk, bias) + F.linear(F.linear(x, a_rk), b_nr) * scale
        for w_nk, a_rk, b_nr, bias, scale in parts
    ]


def separate(x, w, a, b, t, scales):
    """One lora_linear each."""
    parts = zip(w, a, b, t, scales, strict=True)
    return [ops.lora_linear(x, w, a, b, scale=s, bias=bias) for w, a, b, bias, s in parts]


def grouped(x, w, a, b, t, scales):
    return list(lora_group(x, w, a, b, scales=scales, biases=t))


def results(function, tensors, scales, dys, dtype=None):
    """Outputs and the gradients of all leaves, in `dtype`."""

    def cast(tensor):
        made = None if tensor is None else tensor.detach().to(dtype or tensor.dtype)
        return made if made is None else made.clone().requires_grad_(tensor.requires_grad)

    x, *lists = tensors
    tensors = (cast(x), *([cast(t) for t in each] for each in lists))
    ys = function(*tensors, scales)
    used = [(y, dy.to(y.dtype)) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])
    return [y.detach() for y in ys] + [leaf.grad for leaf in flat(*tensors)]


def outputs_like(tensors, dtype=None):
    x, w = tensors[:2]
    return [
        seeded((*x.shape[:-1], w_nk.shape[0]), seed=50 + i, dtype=dtype or x.dtype, device=x.device)
        for i, w_nk in enumerate(w)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [SCALES, (0.5, 1.7, 3.0)])
@pytest.mark.parametrize("m", [(0,), (1,), (2, 3), (129,)])
@pytest.mark.parametrize("count", [2, 3])
def test_accuracy(count, m, scales, dtype, device):
    tensors, scales = operands(count, m, dtype, device=device), scales[:count]
    dys = outputs_like(tensors)
    got = results(grouped, tensors, scales, dys)
    plain = results(composition, tensors, scales, dys)
    exact = results(composition, tensors, scales, dys, torch.float64)
    for index, (mine, theirs, right) in enumerate(zip(got, plain, exact, strict=True)):
        assert mine.dtype == dtype
        assert_accurate(mine, theirs, right, what=f"result {index}")


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_it_is_no_less_accurate_than_one_linear_after_the_other(adapter, device):
    tensors = operands(m=(257,), dtype=torch.bfloat16, adapter=adapter, device=device)
    dys = outputs_like(tensors)
    got = results(grouped, tensors, SCALES, dys)
    alone = results(separate, tensors, SCALES, dys)
    exact = results(composition, tensors, SCALES, dys, torch.float64)
    for index, (mine, theirs, right) in enumerate(zip(got, alone, exact, strict=True)):
        assert (mine.shape, mine.dtype, mine.stride()) == (
            theirs.shape, theirs.dtype, theirs.stride()
        )  # fmt: skip
        assert_accurate(mine, theirs, right, what=f"result {index}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("m", [(0,), (1,), (1300,)])
def test_nf4_weights(m, nested, dtype, device):
    x, w, a, b, t = operands(m=m, dtype=dtype, device=device)
    parts = [packed(n, K, device, nested=nested) for n in OUT]
    w = [
        ops.nf4_dequantize(codes, absmax, (n, K), dtype, nested_absmax=inner, nested_offset=offset)
        for n, (codes, absmax, inner, offset) in zip(OUT, parts, strict=True)
    ]

    def from_codes(x, w, a, b, t, scales):
        codes, nf4 = [each[0] for each in parts], [tuple(each[1:]) for each in parts]
        return list(lora_group(x, codes, a, b, scales=scales, biases=t, nf4=nf4))

    tensors = (x, w, a, b, t)
    dys = outputs_like(tensors)
    got = results(from_codes, tensors, SCALES, dys)
    plain = results(composition, tensors, SCALES, dys)
    exact = results(composition, tensors, SCALES, dys, torch.float64)
    for index, (mine, theirs, right) in enumerate(zip(got, plain, exact, strict=True)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_accurate(mine, theirs, right, what=f"result {index}")


def test_nf4_parts_that_do_not_fit():
    x, w, a, b, _ = operands()
    parts = [packed(n, K, "cpu", nested=False) for n in OUT]
    codes, nf4 = [each[0] for each in parts], [(each[1], None, None) for each in parts]
    nf4[1] = (nf4[1][0][:-1], None, None)
    with pytest.raises(QuantStateError, match="lora_group: absmax"):
        lora_group(x, codes, a, b, scales=SCALES, nf4=nf4)
    with pytest.raises(
        ValueError, match=r"weights\[0\] must have shape \[72, 130\], got \[4680, 1\]"
    ):
        lora_group(x, [codes[0], *w[1:]], a, b, scales=SCALES)


@pytest.mark.parametrize("scales", [SCALES, (0.5, 1.7, 3.0)])
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_match_finite_differences(count, scales):
    tensors = operands(count, (2, 2), torch.float64)
    x, w, a, b, t = tensors
    a, b = [m[: i + 1, :5] for i, m in enumerate(a)], [m[:3, : i + 1] for i, m in enumerate(b)]
    small = (x[..., :5], [m[:3, :5] for m in w], a, b, [v[:3] for v in t])
    leaves = [leaf.detach().clone().requires_grad_() for leaf in flat(*small)]

    def run(x, *rest):
        w, a, b, t = (rest[i * count :][:count] for i in range(4))
        return lora_group(x, w, a, b, scales=scales[:count], biases=t)

    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_exist_exactly_where_they_are_wanted():
    leaves = flat(*operands(2, biases=False))
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        x, w1, w2, a1, a2, b1, b2 = (
            leaf.detach().clone().requires_grad_(want)
            for leaf, want in zip(leaves, wanted, strict=True)
        )
        tensors = (x, [w1, w2], [a1, a2], [b1, b2], [None, None])
        ys, plain = grouped(*tensors, SCALES[:2]), composition(*tensors, SCALES[:2])
        assert [y.requires_grad for y in ys] == [y.requires_grad for y in plain]
        dys = [
            dy if y.requires_grad else None for dy, y in zip(outputs_like(tensors), ys, strict=True)
        ]
        if any(wanted):
            pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
            torch.autograd.backward(*zip(*pairs, strict=True))
            expected = results(composition, tensors, SCALES[:2], dys)[2:]
        else:
            expected = [None] * 7
        for leaf, want, grad in zip(flat(*tensors), wanted, expected, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_autocast_and_mixed_dtypes_follow_linear(base, adapter, device):
    tensors = operands(dtype=base, adapter=adapter, device=device)
    x, w, _, _, _ = tensors
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            ys, alone = grouped(*tensors, SCALES), separate(*tensors, SCALES)
            assert {y.dtype for y in ys} == {F.linear(x, w[0]).dtype}
        grads, expected = (
            torch.autograd.grad(sum(y.float().sum() for y in each), flat(*tensors))
            for each in (ys, alone)
        )
        for mine, theirs in zip(grads, expected, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.05, atol=0.5)


def test_outputs_may_be_changed_in_place():
    tensors = operands(m=(2, 3))
    ys, want = grouped(*tensors, SCALES), composition(*tensors, SCALES)
    assert not any(y._is_view() for y in ys)
    changed = sum(y.mul_(2).relu_().sum() for y in ys)
    expected = sum((2 * y).relu().sum() for y in want)
    got, right = (torch.autograd.grad(t, flat(*tensors)) for t in (changed, expected))
    for mine, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_saved_for_backward():
    tensors, saved = operands(m=(64,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped(*tensors, SCALES)
    known = {t.data_ptr() for t in flat(*tensors)}
    fresh = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in fresh] == [(64, 16 + 8 + 104)]


def test_layouts_of_the_input_and_the_gradients():
    x, *rest = operands(m=(6,))
    wide = torch.full((6, 2 * K + 5), float("nan"))
    wide[:, 3 : 2 * K + 3 : 2] = x.detach()
    layouts = {
        "transposed": x.detach().t().contiguous().t(),
        "strided inside NaN": wide[:, 3 : 2 * K + 3 : 2],
        "expanded": x.detach()[:1].expand(4, K),
        "three axes": x.detach().view(2, 3, K).transpose(0, 1),
        "one row": x.detach()[0],
    }
    for layout in layouts.values():
        tensors = (layout.clone().requires_grad_(), *rest)
        strided = (layout.requires_grad_(), *rest)
        dys = [dy[..., :1].expand_as(dy) for dy in outputs_like(tensors)]
        want = results(composition, tensors, SCALES, dys)
        ys = grouped(*strided, SCALES)
        torch.testing.assert_close(ys, want[:3], rtol=1e-4, atol=1e-4)
        (dx,) = torch.autograd.grad(ys, layout, dys)
        torch.testing.assert_close(dx, want[3], rtol=1e-4, atol=1e-4)


# --- the op's contract ------------------------------------------------------------------------------


def raw(count, m=(2, 3), dtype=torch.float32, scales=SCALES):
    """Arguments of the raw op."""
    x, *lists = operands(count, m, dtype)
    w, a, b, t = ([*each, *[None] * (3 - count)] for each in lists)
    return (x, *w, *t, *a, *b, *[None] * 9, list(scales[:count]), 64)


def raw_backward(wanted, absent=(), dtype=torch.float32):
    x, *rest, scales, blocksize = raw(3, dtype=dtype)
    w, _, a, b = (rest[i * 3 :][:3] for i in range(4))
    dys = outputs_like((x, w))
    dys = [None if i in absent else dy for i, dy in enumerate(dys)]
    z = seeded((6, 128), seed=7, dtype=dtype)
    args = (*dys, x, z, *w, *a, *b, *[None] * 9)
    return (*(t if t is None else t.detach() for t in args), scales, blocksize, wanted)


def quantized(args, at, nested=True):
    """The arguments of a raw op with NF4 in the place of the W_i, which begin at `at`."""
    args, k = list(args), args[0 if at == 1 else 3].shape[-1]
    for i in range(3):
        codes, *scales = packed(args[at + i].shape[0], k, "cpu", nested=nested)
        args[at + i] = codes
        for j, part in enumerate(scales):
            args[at + (12 if at == 1 else 9) + 3 * j + i] = part
    return tuple(args)


ALL = [True] * 10
CASES = {
    "three": ("lora_group", raw(3)),
    "two": ("lora_group", raw(2)),
    "scales": ("lora_group", raw(3, scales=(1.0, 2.0, 3.0))),
    "empty": ("lora_group", raw(3, m=(0, 5))),
    "all": ("lora_group_backward", raw_backward(ALL)),
    "factors": ("lora_group_backward", raw_backward([False] * 4 + [True] * 6)),
    "NF4": ("lora_group", quantized(raw(3), 1)),
    "NF4, flat scales": ("lora_group", quantized(raw(3), 1, nested=False)),
    "NF4 backward": (
        "lora_group_backward", quantized(raw_backward([True] + [False] * 3 + [True] * 6), 5)
    ),
    "absent": (
        "lora_group_backward", raw_backward([True] + [False, True, True] * 3, absent=(0,))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    op, args = CASES[case]
    torch.library.opcheck(OPS[op].overload, args)


@pytest.mark.parametrize("case", CASES)
def test_the_fake_tells_the_truth(case):
    op, args = CASES[case]
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    real = OPS[op].overload(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]
        fake = OPS[op].overload(*fakes)
    for got, told in zip(real, fake, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (told.shape, told.dtype, told.stride())
    storages = [t.untyped_storage().data_ptr() for t in real if t.numel()]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    tensors = operands(m=(2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    dys = outputs_like(tensors)
    for used in (dys, [dys[0], None, dys[2]]):
        got, want = (results(f, tensors, SCALES, used) for f in (compiled, grouped))
        for mine, theirs in zip(got, want, strict=True):
            # A compiled graph gives zeros where an output was not used.
            mine = torch.zeros_like(mine) if theirs is None else mine
            torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_eager_calls_skip_the_dispatcher():
    tensors = operands()
    with ops.recorded_kernels() as ran:
        _, seen = dispatched(lambda: sum(y.sum() for y in grouped(*tensors, SCALES)).backward())
    assert not seen
    assert ran == [("lora_group", "reference"), ("lora_group_backward", "reference")]


def changed(which, index, value):
    x, *lists = operands()
    names = ["w", "a", "b", "t"]
    if which != "x":
        lists[names.index(which)][index] = value
    return (value if which == "x" else x, *lists)


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        (changed("a", 1, torch.zeros(3, 9)), ValueError, "a[1] must have shape [3, 130], got [3, 9]"),
        (changed("b", 2, torch.zeros(24, 9)), ValueError,
         "b[2] must have shape [24, 100], got [24, 9]"),
        (changed("w", 0, torch.zeros(9, 130)), ValueError,
         "weights[0] must have shape [72, 130], got [9, 130]"),
        (changed("w", 1, torch.zeros(40, 130).half()), TypeError,
         "x is float32 and weights[1] float16. Fix: cast x to float16, or call the model under "
         "torch.autocast"),
        (changed("a", 0, torch.zeros(16, 130).int()), TypeError,
         "a[0] must be float32, float16, bfloat16, float64, got int32"),
        (changed("t", 2, torch.zeros(9)), ValueError, "biases[2] must have shape [24], got [9]"),
        (changed("x", 0, torch.zeros(2, 130).int()), TypeError,
         "x must be float32, float16, bfloat16, float64, got int32"),
        (changed("x", 0, torch.zeros(())), ValueError,
         "x must have at least one dimension, got a scalar"),
    ],
)  # fmt: skip
def test_error_texts(tensors, error, text):
    with pytest.raises(error) as caught:
        grouped(*tensors, SCALES)
    assert str(caught.value) == f"lora_group: {text}"


def test_numbers_that_do_not_fit():
    x, w, a, b, _ = operands()
    with pytest.raises(ValueError, match=r"needs 2 to 3 weights .*, got 1, 1, 1, 1, 1"):
        lora_group(x, w[:1], a[:1], b[:1], scales=[1.0])
    with pytest.raises(ValueError, match=r"needs 2 to 3 weights .*, got 3, 2, 3, 3, 3"):
        lora_group(x, w, a[:2], b, scales=SCALES)
    with pytest.raises(ValueError, match="3 linears need as many scales, got 2"):
        lora_group(x, w, a, b, scales=SCALES[:2])
