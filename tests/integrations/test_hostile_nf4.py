# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile NF4 states, from files and in memory: a typed error before any kernel runs, and nothing
half-changed."""

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyfast
from pyfast.errors import PyfastError, QuantStateError
from pyfast.nn import NF4Linear, weight_of
from pyfast.nn.nf4 import STATE_KEY
from pyfast.ops import recorded_kernels
from tests.family_models import variant
from tests.integrations.checkpoints import load, reread, written_by_bitsandbytes
from tests.models import fingerprint, llama, logits

bnb = pytest.importorskip("bitsandbytes")

DTYPES = [torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32, torch.float64]
DTYPES += [torch.bfloat16, torch.bool, torch.complex64]
NUMBERS = [0, 1, -1, 2, 3, 63, 64, 65, 128, 256, 1 << 31, 1 << 40, 1 << 70, 1e30, 3.4e38, 1e39]
VALUES = [*NUMBERS, None, True, "", "nf4", "fp4", "float16", "hub", [], [64], [64, 128], [128, 64]]
VALUES += [[2, 64, 64], [-64, -128], [1 << 40, 1 << 40], {}, float("nan"), float("inf")]


def states(nested, shape=(64, 128)):
    torch.manual_seed(0)
    layer = NF4Linear.from_weight(weight_of(nn.Linear(shape[1], shape[0], False)), nested=nested)
    return layer, {key: tensor.clone() for key, tensor in layer.state_dict().items()}


# --- mutations -----------------------------------------------------------------------------------


def tensor_mutation(tensor, rng):
    """A tensor that is damaged in one way."""
    flat = tensor.clone().view(-1)
    size = flat.numel()
    kind = rng.randrange(9)
    if kind == 0:
        return flat[: rng.randrange(size + 1)].clone()
    if kind == 1:
        return torch.cat([flat, flat[: rng.randrange(1, size + 1)]])
    if kind == 2:
        return tensor.to(rng.choice(DTYPES))
    if kind == 3:
        return tensor.reshape(rng.choice([(1, -1), (-1,), (-1, 1), (1, 1, -1)]))
    if kind == 4 and flat.stride(0) == 1:  # bits
        bytes_ = flat.view(torch.uint8)
        for _ in range(rng.randrange(1, 9)):
            bytes_[rng.randrange(bytes_.numel())] ^= 1 << rng.randrange(8)
        return flat.view(tensor.shape)
    if kind == 5 and tensor.is_floating_point():
        flat[rng.randrange(size)] = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38])
        return flat.view(tensor.shape)
    if kind == 6:
        return rng.choice([tensor.reshape(-1)[0].clone(), tensor.to("meta"), torch.zeros(0)])
    if kind == 7:
        return rng.choice([None, "text", 7, flat.tolist()])
    return torch.stack([flat, flat], 1)[:, 0].view(tensor.shape)  # strided, if it has one axis


def fact_mutation(blob, rng):
    """The JSON facts with one of them changed, added or gone; or bytes that are no JSON."""
    facts = json.loads(bytes(blob.tolist()))
    kind, name = rng.randrange(5), rng.choice([*facts, "nested_blocksize", "extra"])
    if kind == 0:
        facts.pop(name, None)
    elif kind == 1 and isinstance(facts.get(name), (int, float)):
        facts[name] = facts[name] * rng.choice(NUMBERS)
    else:
        facts[name] = rng.choice(VALUES)
    data = bytearray(json.dumps(facts).encode())
    if kind == 4:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return torch.frombuffer(data, dtype=torch.uint8)


def mutated(state, rng):
    """A state dict that is damaged in one to three places."""
    state = dict(state)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice(list(state))
        kind = rng.randrange(10)
        if kind == 0 and len(state) > 1:
            del state[key]
        elif kind == 1:
            state[rng.choice(["weight.extra", "weight.", f"weight.{STATE_KEY[:-3]}fp4"])] = state[
                key
            ]
        elif kind == 2:
            state[key] = state[rng.choice(list(state))]
        elif key.endswith(STATE_KEY) and isinstance(state[key], torch.Tensor):
            try:
                state[key] = fact_mutation(state[key], rng)
            except (
                ValueError,
                AttributeError,
                TypeError,
            ):  # the second time it is no JSON any more
                state[key] = torch.zeros(3, dtype=torch.uint8)
        elif isinstance(state[key], torch.Tensor) and state[key].numel() and state[key].is_cpu:
            state[key] = tensor_mutation(state[key], rng)
    return state


def fuzz(cases, seed):
    """Load mutated states; how many were refused. What is taken must be whole."""
    rng, refused = random.Random(seed), 0
    originals = {nested: states(nested) for nested in (True, False)}
    for _ in range(cases):
        layer, good = originals[rng.random() < 0.5]
        state = mutated(good, rng)
        before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        try:
            with recorded_kernels() as kernels:
                layer.load_state_dict(state, strict="weight" in state)
        except PyfastError:
            refused += 1
            assert not kernels
            after = layer.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
        else:
            dense = layer.nf4_weight().dense(torch.float32)
            assert dense.shape == (64, 128)
            assert torch.isfinite(dense).all()
            layer.to(torch.float32)
            layer.load_state_dict(good)
    return refused


def test_ten_thousand_mutated_states():
    assert 6000 < fuzz(10_000, seed=0) < 10_000


# --- a model's states ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [llama, lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in "abc"))]
)
def test_one_damaged_layer_leaves_all_others_unchanged(make):
    model, other = pyfast.quantize(make()), pyfast.quantize(make())
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.add_(1)
    state = other.state_dict()
    last = [key for key in state if key.endswith("absmax")][-1]
    state[last] = state[last] * float("nan")
    for each in (model, copy.deepcopy(model)):
        before = fingerprint(each)
        with pytest.raises(QuantStateError, match=last.partition(".weight")[0]):
            each.load_state_dict(state)
        assert fingerprint(each) == before


# --- files ---------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.down_proj.weight"


def facts(**changes):
    def change(blob):
        values = json.loads(bytes(blob.tolist())) | changes
        values = {key: value for key, value in values.items() if value is not ...}
        return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)

    return f".{STATE_KEY}", change


FILES = {
    "packed cut": ("", lambda t: t[:-1].clone()),
    "packed gone": ("", None),
    "packed signed": ("", lambda t: t.view(torch.int8)),
    "absmax cut": (".absmax", lambda t: t[:1].clone()),
    "absmax long": (".absmax", lambda t: torch.cat([t, t])),
    "absmax gone": (".absmax", None),
    "absmax float": (".absmax", lambda t: t.float()),
    "map changed": (".quant_map", lambda t: t + 1e-7),
    "map of 8 bits": (".quant_map", lambda t: t.repeat(16)),
    "nested cut": (".nested_absmax", lambda t: t[:0].clone()),
    "nested gone": (".nested_absmax", None),
    "nested nan": (".nested_absmax", lambda t: t * float("nan")),
    "nested infinite": (".nested_absmax", lambda t: t * float("inf")),
    "nested too large": (".nested_absmax", lambda t: t * 0 + 3.402e38),
    "nested half": (".nested_absmax", lambda t: t.half()),
    "nested map": (".nested_quant_map", lambda t: t.flip(0)),
    "offset infinite": facts(nested_offset=float("inf")),
    "offset gone": facts(nested_offset=...),
    "offset text": facts(nested_offset="0.1"),
    "flat facts": facts(nested_blocksize=...),
    "nested in halves": facts(nested_dtype="float16"),
    "blocksize 128": facts(blocksize=128),
    "blocksize 0": facts(blocksize=0),
    "shape swapped": facts(shape=[128, 64]),
    "shape of experts": facts(shape=[2, 32, 128]),
    "shape huge": facts(shape=[1 << 40, 1 << 40]),
    "another type": facts(quant_type="fp4"),
    "a dtype that is none": facts(dtype="hub"),
    "state gone": (f".{STATE_KEY}", None),
    "state no JSON": (f".{STATE_KEY}", lambda t: t[:-1].clone()),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    options = {"bnb_4bit_use_double_quant": True}
    return written_by_bitsandbytes(tmp_path_factory.mktemp("bnb"), **options)[0]


@pytest.mark.parametrize(("name", "change"), FILES.values(), ids=FILES.keys())
def test_damaged_files(name, change, source):
    file = source / "model.safetensors"
    good = load_file(file)
    bad = {key: tensor for key, tensor in good.items() if change or key != LAYER + name}
    if change:
        bad[LAYER + name] = change(good[LAYER + name])
    try:
        save_file(bad, file, metadata={"format": "pt"})
        with recorded_kernels() as kernels, pytest.raises(QuantStateError, match=LAYER):
            reread(source)
    finally:
        save_file(good, file, metadata={"format": "pt"})
    assert not kernels
    assert torch.isfinite(logits(reread(source))).all()


def test_damaged_experts(tmp_path):
    pyfast.quantize(variant("mixtral")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    key = next(key for key in good if key.endswith("nf4_down_proj.weight.absmax"))
    changes = {
        key: good[key][:-1].clone(),
        key.removesuffix("absmax") + STATE_KEY: facts(shape=[4, 96, 64])[1](
            good[key.removesuffix("absmax") + STATE_KEY]
        ),
    }
    for name, tensor in changes.items():
        save_file(good | {name: tensor}, file, metadata={"format": "pt"})
        with pytest.raises(QuantStateError, match=r"experts\.down_proj"):
            load(tmp_path)


# --- bitsandbytes' states in memory --------------------------------------------------------------


def linear4bit(nested=True):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, compress_statistics=nested, quant_type="nf4")
    return layer.to("cpu").train()


def as_list(state):
    """The form before bitsandbytes 0.41.3."""
    kinds = [state.quant_type, state.code]
    nested = None
    if state.nested:
        two = state.state2
        nested = [state.offset, [two.absmax, two.code, two.blocksize, False, two.dtype, None, None]]
    return [state.absmax, state.shape, state.dtype, state.blocksize, nested, *kinds]


@pytest.mark.parametrize("nested", [True, False])
def test_lists_of_old_are_read(nested):
    layer, x = linear4bit(nested), torch.randn(3, 128)
    expected = layer(x)
    model = nn.Sequential(layer)
    layer.weight.quant_state = as_list(layer.weight.quant_state)
    assert [row.op for row in pyfast.accelerate(model).rows] == ["nf4_linear"]
    assert torch.allclose(model(x), expected, atol=1e-5)
    bad = as_list(linear4bit(nested).weight.quant_state)
    bad[0] = bad[0][:1]
    layer.weight.quant_state = bad
    with pytest.raises(QuantStateError, match="absmax has 1 values, 128 are needed"):
        pyfast.accelerate(model)


def set_on(path, value):
    def change(state):
        *owners, name = path.split(".")
        for owner in owners:
            state = getattr(state, owner)
        before = getattr(state, name)
        setattr(state, name, value(before) if callable(value) else value)

    return change


MEMORY = {
    "absmax cut": set_on("absmax", lambda t: t[:1]),
    "absmax no tensor": set_on("absmax", [1.0]),
    "absmax half": set_on("absmax", lambda t: t.half()),
    "nested cut": set_on("state2.absmax", lambda t: t[:0]),
    "nested nan": set_on("state2.absmax", lambda t: t * float("nan")),
    "offset nan": set_on("offset", torch.tensor(float("nan"))),
    "offset of three": set_on("offset", torch.zeros(3)),
    "offset no tensor": set_on("offset", 0.5),
    "code": set_on("code", lambda t: t.flip(0)),
    "nested code": set_on("state2.code", lambda t: t[:16]),
    "blocksize": set_on("blocksize", 128),
    "blocksize of none": set_on("blocksize", None),
    "shape": set_on("shape", torch.Size([128, 64])),
    "dtype": set_on("dtype", torch.int8),
}


@pytest.mark.parametrize("damage", MEMORY.values(), ids=MEMORY.keys())
def test_damaged_states_in_memory(damage):
    model = nn.Sequential(linear4bit(), linear4bit())
    damage(model[1].weight.quant_state)
    kinds = [type(module) for module in model]
    with recorded_kernels() as kernels, pytest.raises(QuantStateError, match="1: "):
        pyfast.accelerate(model)
    assert [type(module) for module in model] == kinds
    assert not kernels


def test_a_packed_weight_that_was_cut_in_memory():
    model = nn.Sequential(linear4bit())
    model[0].weight.data = model[0].weight.data[:-1]
    with pytest.raises(QuantStateError, match="packed has 4095 values, 4096 are needed"):
        pyfast.accelerate(model)
