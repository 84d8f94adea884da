# SPDX-License-Identifier: Apache-2.0
"""Real models whose q, k and v, and gate and up, are computed together: PEFT's numbers, by fewer calls."""

import copy
import pickle
from collections import Counter

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn

import pyfast
from pyfast import LoraConfig, ops
from pyfast.families import shared_inputs
from pyfast.nn.group import GroupMember
from pyfast.ops._serving import serving
from pyfast.testing import assert_accurate, seeded
from tests.models import gpt2, llama, logits, plain, randomise, token_ids, train

pytestmark = [
    # The name that the oldest transformers has.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning"),
]
NAMES = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
STEP = {"lora_group": 4, "lora_linear": 4}
"""Calls in each direction of two layers: attention and MLP; output and down."""


def ours(dtype=torch.float64, targets="all-linear", dropout=0.0, **options):
    config = LoraConfig(target_modules=targets, lora_dropout=dropout)
    model = pyfast.apply(llama(**options).to(dtype), config, autocast_adapter_dtype=False)
    return randomise(model)


def theirs(dtype=torch.float64, targets="all-linear", dropout=0.0, **options):
    config = peft.LoraConfig(target_modules=targets, lora_dropout=dropout)
    model = get_peft_model(llama(**options).to(dtype), config, autocast_adapter_dtype=False)
    return randomise(model)


def accelerated(**options):
    model = theirs(**options)
    pyfast.accelerate(model)
    return model


BOTH = pytest.mark.parametrize("make", [ours, accelerated])


def calls(call):
    with ops.recorded_kernels() as ran:
        result = call()
    return result, Counter(op for op, _ in ran)


def loss(model, ids=None):
    ids = token_ids() if ids is None else ids
    return model(input_ids=ids, labels=ids).loss


def gradients(model):
    return {plain(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got, want, atol=1e-10):
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=atol, msg=name)


def nothing_kept(model):
    groups = {
        m.input_group for m in model.modules() if isinstance(m, GroupMember) and m.input_group
    }
    assert groups
    return all(group._kept is None for group in groups)


# --- training ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_training_gives_pefts_numbers(make, bias):
    model, peer = make(bias=bias), theirs(bias=bias)
    torch.testing.assert_close(logits(model), logits(peer), rtol=0, atol=1e-12)
    grads, expected = [], []
    losses = train(model, grads=grads, steps=4, eps=1e-3)
    assert losses == pytest.approx(train(peer, grads=expected, steps=4, eps=1e-3), abs=1e-10)
    for got, want in zip(grads, expected, strict=True):
        same(got, want, atol=1e-9)
    assert nothing_kept(model)


@BOTH
def test_a_step_calls_the_group_once_for_each_attention_and_mlp(make):
    model = make().train()
    value, forward = calls(lambda: loss(model))
    assert forward == STEP
    _, backward = calls(value.backward)
    assert backward == {f"{op}_backward": count for op, count in STEP.items()}
    assert nothing_kept(model)
    # The first half of each: q and v, PEFT's default for this family.
    model = make(targets=["q_proj", "v_proj"])
    _, forward = calls(lambda: loss(model))
    assert forward == {"lora_group": 2}


def qkv(layer, x):
    return torch.cat([getattr(layer.self_attn, name)(x) for name in NAMES[0]], dim=-1)


@BOTH
@pytest.mark.parametrize("call", [qkv, lambda layer, x: layer.mlp(x)], ids=["qkv", "mlp"])
def test_half_precision_is_as_accurate_as_pefts(make, call):
    options = {"layers": 1, "hidden_size": 256, "intermediate_size": 512}
    results = []
    for maker, dtype in ((make, torch.bfloat16), (theirs, torch.bfloat16), (theirs, torch.float64)):
        model = maker(dtype=torch.bfloat16, **options).to(dtype)
        (layer,) = (m for p, m in model.named_modules() if p.endswith("layers.0"))
        x = seeded((2, 96, 256), seed=3, dtype=torch.bfloat16).to(dtype).requires_grad_()
        y = call(layer, x)
        y.backward(seeded(y.shape, seed=4, dtype=torch.bfloat16).to(dtype))
        results.append({"y": y.detach(), "dx": x.grad, **gradients(model)})
    for name, exact in results[2].items():
        assert_accurate(results[0][name], results[1][name], exact, what=name)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(make, reentrant):
    model, peer = make().train(), theirs().train()
    loss(peer).backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    value, forward = calls(lambda: loss(model))
    assert forward == STEP
    _, rest = calls(value.backward)
    assert rest == {**STEP, **{f"{op}_backward": count for op, count in STEP.items()}}
    same(gradients(model), gradients(peer))
    assert nothing_kept(model)


@BOTH
def test_gradients_accumulate(make):
    model, peer = make().train(), theirs().train()
    for each in (model, peer):
        for seed in range(3):
            loss(each, token_ids(seed=seed)).backward()
    same(gradients(model), gradients(peer))


def test_compiled_models_have_no_groups():
    model, peer = ours(layers=1), theirs(layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    value, _ = calls(lambda: loss(compiled))
    value.backward()
    loss(peer).backward()
    same(gradients(model), gradients(peer))


# --- serving ----------------------------------------------------------------------------------------


@BOTH
def test_generation_with_a_cache(make):
    model, peer = make(), theirs()
    options = {"max_new_tokens": 8, "do_sample": False}
    got, ran = calls(lambda: model.generate(token_ids(), **options))
    assert torch.equal(got, peer.generate(token_ids(), **options))
    assert ran == {op: 8 * count for op, count in STEP.items()}
    assert nothing_kept(model)


def test_states_of_our_adapters(tmp_path):
    model, base = ours(), logits(llama().double())
    active, peer = logits(model), theirs()
    with pyfast.adapters_disabled(model):
        (off, ran) = calls(lambda: logits(model))
        assert torch.equal(off, base)
        assert not ran
    pyfast.merge(model)
    assert torch.allclose(logits(model), active, atol=1e-5)
    pyfast.unmerge(model)
    options = {"target_modules": ["q_proj", "k_proj", "up_proj"], "r": 3}
    pyfast.apply(model, LoraConfig(**options), adapter_name="b")
    peer.add_adapter("b", peft.LoraConfig(**options))
    randomise(model), randomise(peer)
    for names, groups in ((["b"], 2), (["default"], 4), (["default", "b"], 0)):
        pyfast.set_adapter(model, names)
        peer.base_model.set_adapter(names)
        got, ran = calls(lambda: logits(model))
        torch.testing.assert_close(got, logits(peer), rtol=0, atol=1e-12)
        # With both active q_proj, k_proj and up_proj have two, and the others no company.
        assert ran["lora_group"] == groups
    pyfast.delete_adapter(model, "default")
    pyfast.set_adapter(model, "b")
    peer.base_model.set_adapter(["b"])
    got, ran = calls(lambda: logits(model))
    torch.testing.assert_close(got, logits(peer), rtol=0, atol=1e-12)
    assert ran["lora_group"] == 2
    pyfast.save_adapter(model, tmp_path, "b")
    loaded = pyfast.load_adapter(llama().double(), tmp_path)
    assert calls(lambda: logits(loaded))[1] == {"lora_group": 2, "lora_linear": 2}
    torch.testing.assert_close(logits(loaded), got, rtol=0, atol=1e-6)
    pyfast.unload(model)
    assert torch.equal(logits(model), base)


def test_states_of_pefts_adapters():
    model, peer = accelerated(), theirs()
    with model.disable_adapter():
        off, ran = calls(lambda: logits(model))
    assert torch.equal(off, logits(llama().double()))
    assert not ran
    for each in (model, peer):
        each.add_adapter("b", peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
        randomise(each)
        each.set_adapter("b")
    got, ran = calls(lambda: logits(model))
    torch.testing.assert_close(got, logits(peer), rtol=0, atol=1e-12)
    assert ran == {"lora_group": 2}
    for each in (model, peer):
        each.base_model.set_adapter(["default", "b"])
    got, ran = calls(lambda: logits(model))
    torch.testing.assert_close(got, logits(peer), rtol=0, atol=1e-12)
    assert ran == {"lora_group": 2, "lora_linear": 6}  # gate and up; v, output and down
    for each in (model, peer):
        each.delete_adapter("b")
        each.set_adapter("default")
    got, ran = calls(lambda: logits(model))
    torch.testing.assert_close(got, logits(peer), rtol=0, atol=1e-12)
    assert ran == STEP
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), got, rtol=0, atol=1e-6)


@BOTH
def test_copies(make):
    model = make()
    keys = list(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == keys
        got, ran = calls(lambda other=other: logits(other))
        assert torch.equal(got, logits(model))
        assert ran == STEP
        randomise(other, seed=4)
        assert not torch.equal(logits(other), logits(model))
        copied, mine = (
            {m.input_group for m in each.modules() if isinstance(m, GroupMember)} - {None}
            for each in (other, model)
        )
        assert not copied & mine


def test_moves():
    model, peer = ours(), theirs()
    for each in (model, peer):
        each.float()
    got, ran = calls(lambda: logits(model))
    torch.testing.assert_close(got, logits(peer), rtol=1e-5, atol=1e-5)
    assert ran == STEP


# --- which modules, and what the user is told -------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.model, nn.Sequential, theirs])
def test_the_table_finds_them_in_every_wrapper(wrap):
    model = wrap() if wrap is theirs else wrap(llama())
    found = list(shared_inputs(model))
    assert [list(each) for each in found] == [*NAMES] * 2
    parts = dict(model.named_modules())
    assert found[2]["k_proj"] is next(
        m for p, m in parts.items() if p.endswith("layers.1.self_attn.k_proj")
    )
    assert list(shared_inputs(gpt2())) == []
    assert list(shared_inputs(nn.Linear(2, 2))) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["LoraLinear", "PEFT Linear"])
def test_the_report_names_the_groups(kind, dropout):
    model = (ours if kind == "LoraLinear" else theirs)(dropout=dropout)
    report = pyfast.accelerate(model)
    attention, mlp = (f"pyfast.lora_group of {', '.join(names)}" for names in NAMES)
    if dropout:
        attention, mlp = (
            f"pyfast.lora_linear; {each} while dropout is off" for each in (attention, mlp)
        )
    assert {line.partition(" (first")[0].strip() for line in str(report).splitlines()} == {
        "pyfast serves 14 of 15 linear modules",
        f"6 x {kind}: {attention}",
        f"4 x {kind}: {mlp}",
        f"4 x {kind}: pyfast.lora_linear",
        "1 x Linear: left alone: a dense linear without adapter: torch serves it best",
        *(f"pyfast.{op} on cpu: {serving(op, 'cpu')[0]}" for op in ("lora_group", "lora_linear")),
    }
    assert str(pyfast.accelerate(model)) == str(report)
    layer = next(m for p, m in model.named_modules() if p.endswith("layers.1.self_attn.v_proj"))
    assert "group=q_proj+k_proj+v_proj" in repr(layer)


def test_quantised_models_compute_their_own_on_the_cpu():
    model = pyfast.apply(pyfast.quantize(llama()), LoraConfig(target_modules="all-linear"))
    _, ran = calls(lambda: logits(model))
    assert ran["lora_group"] == 0
    assert ran["lora_linear"] == 14
    assert not any(m.company() for m in model.modules() if isinstance(m, GroupMember))
    assert {row.op for row in pyfast.accelerate(model).served} == {"lora_linear"}
