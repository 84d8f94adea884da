# SPDX-License-Identifier: Apache-2.0
"""`NF4Linear` against bitsandbytes' `Linear4bit`: bytes, outputs, state dicts, and damaged ones."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

import pyfast
from pyfast.errors import QuantStateError
from pyfast.nn import DenseWeight, NF4Linear, weight_of
from pyfast.nn.nf4 import STATE_KEY

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(64, 128), (96, 64), (8, 192), (130, 64)]


def dense(out_features, in_features, bias=True, dtype=torch.float32):
    torch.manual_seed(out_features)
    return nn.Linear(in_features, out_features, bias).to(dtype)


def oracle(layer, nested=True, blocksize=64):
    theirs = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=nested,
        quant_type="nf4",
    )
    weight = bnb.nn.Params4bit(
        layer.weight.data.clone(),
        requires_grad=False,
        compress_statistics=nested,
        quant_type="nf4",
        blocksize=blocksize,
        module=theirs,
    )
    theirs.weight = weight
    if layer.bias is not None:
        theirs.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return theirs.to("cpu")


def ours_of(layer, nested=True, blocksize=64):
    return NF4Linear.from_weight(weight_of(layer), nested=nested, blocksize=blocksize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_is_that_of_bitsandbytes(shape, nested, dtype):
    layer = dense(*shape, dtype=dtype)
    ours, theirs = ours_of(layer, nested).state_dict(), oracle(layer, nested).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        if key == f"weight.{STATE_KEY}":
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist()))
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
def test_block_sizes(blocksize):
    layer = dense(64, 256)
    ours = ours_of(layer, blocksize=blocksize).state_dict()
    theirs = oracle(layer, blocksize=blocksize).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_input_gradient(shape, nested):
    layer = dense(*shape)
    ours, theirs = ours_of(layer, nested), oracle(layer, nested)
    x = torch.randn(3, 5, shape[1], requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, y2 = ours(x), theirs(x2)
    assert torch.allclose(y, y2, atol=1e-5)
    y.square().sum().backward()
    y2.square().sum().backward()
    assert torch.allclose(x.grad, x2.grad, atol=1e-3, rtol=1e-5)
    assert ours(torch.randn(0, shape[1])).shape == (0, shape[0])


@pytest.mark.parametrize("nested", [True, False])
def test_each_loads_the_others_state_dict(nested):
    layer, other = dense(64, 128), dense(64, 128)
    other.weight.data.mul_(3)
    ours, theirs = ours_of(layer, nested), oracle(other, nested)
    x = torch.randn(4, 128, requires_grad=True)
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    # The reverse direction: from_prequantized is how bitsandbytes reads these keys.
    state = ours_of(layer, nested).state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k not in ("weight", "bias")}
    weight = bnb.nn.Params4bit.from_prequantized(
        state["weight"], {f"weight.{k}": v for k, v in stats.items()}, device="cpu"
    )
    assert torch.equal(
        bnb.functional.dequantize_4bit(weight.data, weight.quant_state),
        ours_of(layer, nested).nf4_weight().dense(),
    )


def test_loads_across_nesting_and_block_size():
    layer = dense(64, 128)
    ours = ours_of(layer, nested=True)
    ours.load_state_dict(ours_of(layer, nested=False, blocksize=128).state_dict())
    assert ours.nested_absmax is None
    assert ours.blocksize == 128
    assert ours.state_dict().keys() == oracle(layer, nested=False).state_dict().keys()


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_scales_stay_float32_through_dtype_changes(convert):
    ours = ours_of(dense(64, 128))
    before = ours.nf4_weight().dense().clone()
    convert(ours)
    assert ours.nested_absmax.dtype == ours.nested_offset.dtype == torch.float32
    assert ours.absmax.dtype == ours.weight.dtype == torch.uint8
    assert ours.bias.dtype != torch.float32
    assert torch.equal(ours.nf4_weight().dense(torch.float32), before)
    assert ours.nf4_weight().dense().dtype == ours.bias.dtype
    x = torch.randn(2, 128).to(ours.bias.dtype)
    assert ours(x).dtype == x.dtype


def test_merging_after_a_change_of_dtype_gives_a_model_that_runs():
    model = pyfast.quantize(nn.Sequential(dense(64, 128), dense(64, 64))).to(torch.bfloat16)
    config = pyfast.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    pyfast.apply(model, config)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    expected = model(x)
    pyfast.merge(model)
    assert torch.allclose(model(x), expected, atol=0.1)


def test_float64_comes_back_from_a_state_dict():
    ours = ours_of(dense(64, 128, dtype=torch.float64))
    other = ours_of(dense(64, 128))
    other.load_state_dict(ours.state_dict())
    expected = oracle(dense(64, 128)).state_dict()
    assert torch.equal(other.weight.data, expected["weight"])
    assert torch.equal(other.nf4_weight().dense(), ours.nf4_weight().dense())
    assert other.nf4_weight().dtype == torch.float64


@pytest.mark.parametrize("nested", [True, False])
def test_assigning_a_state_dict_brings_a_layer_back_from_the_meta_device(nested):
    ours, x = ours_of(dense(64, 128), nested), torch.randn(3, 128)
    expected, state = ours(x), ours.state_dict()
    ours.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(ours(x), expected)


def test_deepcopy_pickle_and_torch_save():
    ours = ours_of(dense(64, 128))
    x = torch.randn(2, 128)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(x), ours(x))
        assert other.weight.data_ptr() != ours.weight.data_ptr()


def test_repr_names_the_format():
    assert "blocksize=64, nested=True" in repr(ours_of(dense(64, 128)))


def replace_fact(**facts):
    def damage(state):
        values = json.loads(bytes(state[f"weight.{STATE_KEY}"].tolist()))
        values.update(facts)
        blob = json.dumps({k: v for k, v in values.items() if v is not ...}).encode()
        state[f"weight.{STATE_KEY}"] = torch.tensor(list(blob), dtype=torch.uint8)

    return damage


def replace(key, value):
    def damage(state):
        if value is None:
            del state[key]
        else:
            state[key] = value(state[key]) if callable(value) else value

    return damage


def as_blob(data):
    return replace(f"weight.{STATE_KEY}", torch.tensor(list(data), dtype=torch.uint8))


DAMAGE = {
    "absmax cut": replace("weight.absmax", lambda t: t[:1]),
    "absmax float": replace("weight.absmax", lambda t: t.float()),
    "absmax gone": replace("weight.absmax", None),
    "nested gone": replace("weight.nested_absmax", None),
    "nested map gone": replace("weight.nested_quant_map", None),
    "nested nan": replace("weight.nested_absmax", lambda t: t * float("nan")),
    "nested half": replace("weight.nested_absmax", lambda t: t.half()),
    "map changed": replace("weight.quant_map", lambda t: t.flip(0)),
    "map short": replace("weight.quant_map", lambda t: t[:3]),
    "nested map changed": replace("weight.nested_quant_map", lambda t: t + 1),
    "state gone": replace(f"weight.{STATE_KEY}", None),
    "state float": replace(f"weight.{STATE_KEY}", torch.zeros(4)),
    "state huge": replace(f"weight.{STATE_KEY}", torch.zeros(1 << 17, dtype=torch.uint8)),
    "state not json": as_blob(b"\xff\xfe{"),
    "state a list": as_blob(b"[1]"),
    "state nested deep": as_blob(b"[" * 60000),
    "type fp4": replace_fact(quant_type="fp4"),
    "dtype int": replace_fact(dtype="int8"),
    "dtype hub": replace_fact(dtype="hub"),
    "dtype list": replace_fact(dtype=[]),
    "shape negative": replace_fact(shape=[-64, 128]),
    "shape big": replace_fact(shape=[64, 1 << 40]),
    "shape swapped": replace_fact(shape=[128, 64]),
    "shape of one": replace_fact(shape=[64]),
    "shape of text": replace_fact(shape="64"),
    "shape of bools": replace_fact(shape=[True, True]),
    "blocksize 0": replace_fact(blocksize=0),
    "blocksize 3": replace_fact(blocksize=3),
    "blocksize -64": replace_fact(blocksize=-64),
    "blocksize text": replace_fact(blocksize="64"),
    "blocksize double": replace_fact(blocksize=128),
    "nested blocksize": replace_fact(nested_blocksize=64),
    "offset gone": replace_fact(nested_offset=...),
    "offset inf": replace_fact(nested_offset=float("inf")),
    "offset text": replace_fact(nested_offset="x"),
    "offset big": replace_fact(nested_offset=10**400),
    "unknown key": replace("weight.extra", torch.zeros(1)),
    "packed cut": replace("weight", lambda t: t[:-1]),
    "packed scalar": replace("weight", torch.tensor(1, dtype=torch.uint8)),
    "packed dense": replace("weight", torch.randn(64, 128)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_states_are_refused_and_change_nothing(damage):
    ours = ours_of(dense(64, 128))
    state = {k: v.clone() for k, v in ours_of(dense(64, 128)).state_dict().items()}
    damage(state)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(QuantStateError) as caught:
        ours.load_state_dict(state)
    assert str(caught.value).startswith("[PF013]")
    after = ours.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_dense_checkpoint_into_a_quantised_layer_is_refused():
    layer = dense(64, 128)
    ours = ours_of(layer)
    with pytest.raises(QuantStateError, match=r"quantisation keys .* are missing"):
        ours.load_state_dict(layer.state_dict())


def test_error_text_names_module_and_reason():
    model = nn.Sequential(dense(64, 128))
    pyfast.quantize(model)
    state = model.state_dict()
    state["0.weight.nested_absmax"] = state["0.weight.nested_absmax"] * float("inf")
    with pytest.raises(QuantStateError) as caught:
        model.load_state_dict(state)
    assert str(caught.value) == (
        "[PF013] 0: scales hold NaN or infinity; the file is damaged or not an NF4 checkpoint. "
        "The layer is unchanged"
    )


def test_layers_share_no_tensor_in_the_state_dict():
    """safetensors refuses tensors that share memory, so `save_pretrained` of a quantised model needs it."""
    layers = torch.nn.ModuleList(
        NF4Linear.from_weight(DenseWeight(torch.randn(8, 64))) for _ in range(2)
    )
    pointers = [tensor.data_ptr() for tensor in layers.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
