# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture in NF4: bitsandbytes' bytes for the whole 3-D tensor, and what transformers computes
with the dequantised ones."""

import copy
import pickle

import pytest
import torch
import transformers
from torch.nn import functional as F

import pyfast
from pyfast.errors import NonFiniteError, TargetModuleError
from pyfast.nn import NF4Linear, NF4Tensor
from pyfast.nn.experts import expert_tensors
from pyfast.ops import recorded_kernels
from tests.family_models import variant
from tests.models import fingerprint, logits, token_ids, twin

bnb = pytest.importorskip("bitsandbytes")

TENSORS = ("gate_up_proj", "down_proj")
# Experts that start inside of a block of 256 nested scales, and such that do not.
SIZES = [{"hidden_size": 128}, {"intermediate_size": 192}, {"intermediate_size": 64}]


def mixtral(**changes):
    # bitsandbytes 0.50 misreads rows that are no multiple of 64 on the CPU.
    return variant("mixtral", **{"intermediate_size": 128, **changes})


def experts(model, layer=0):
    return model.model.layers[layer].mlp.experts


def dequantised(model, implementation="grouped_mm", **changes):
    """A dense twin with the values that the NF4 weights of a model stand for, by bitsandbytes."""
    dense = mixtral(**changes)
    dense.set_experts_implementation(implementation)
    state = dense.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, NF4Tensor):
            parts = {k: v for k, v in module.state_dict().items() if k.startswith("weight.")}
            facts = bnb.functional.QuantState.from_dict(dict(parts), torch.device("cpu"))
            values = bnb.functional.dequantize_4bit(module.weight.data, facts)
            key = path.replace("nf4_", "") if "experts" in path else f"{path}.weight"
            state[key] = values.view(state[key].shape)
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_bitsandbytes(dtype, nested):
    model = mixtral().to(dtype)
    before = twin(model)
    pyfast.quantize(model, nested=nested)
    for name in TENSORS:
        dense = getattr(experts(before), name).data
        packed, state = bnb.functional.quantize_4bit(
            dense, quant_type="nf4", compress_statistics=nested
        )
        made = experts(model).get_submodule(f"nf4_{name}")
        theirs = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(True).items()}
        ours = made.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
        assert made.shape == tuple(dense.shape)
        assert torch.equal(
            getattr(experts(model), name), bnb.functional.dequantize_4bit(packed, state)
        )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_outputs_and_gradients(implementation, sizes, nested):
    model = pyfast.quantize(mixtral(**sizes), nested=nested)
    model.set_experts_implementation(implementation)
    dense = dequantised(model, implementation, **sizes)
    x = model.model.embed_tokens(token_ids()).detach()
    gradients = []
    for each in (model, dense):
        inner = x.clone().requires_grad_()
        out = each(inputs_embeds=inner).logits
        out.square().sum().backward()
        gradients.append((out, inner.grad))
    (out, grad), (expected, wanted) = gradients
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(grad, wanted, atol=1e-4, rtol=1e-4)


def test_bfloat16():
    model = pyfast.quantize(mixtral().to(torch.bfloat16))
    dense = dequantised(model).to(torch.bfloat16)
    assert torch.allclose(logits(model), logits(dense), atol=3e-2)


def test_no_expert_is_kept_dense_for_the_backward():
    model = pyfast.quantize(mixtral())
    shapes = []

    def pack(tensor):
        shapes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    x = torch.randn(6, 64, requires_grad=True)
    chosen = torch.tensor([[0, 3]] * 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(model)(x, chosen, torch.full((6, 2), 0.5))
    assert shapes
    assert all(
        shape[-1:] != (64,) or shape[0] <= 6 for shape, dtype in shapes if dtype != torch.uint8
    )
    assert not any(len(shape) == 3 for shape, _ in shapes)


def test_only_experts_that_tokens_go_to_are_read():
    model = pyfast.quantize(mixtral())
    x, chosen = torch.randn(6, 64), torch.tensor([[1, 2]] * 6)
    with torch.no_grad(), recorded_kernels() as kernels:
        out = experts(model)(x, chosen, torch.full((6, 2), 0.5))
    assert len([op for op, _ in kernels if op == "nf4_linear"]) == 4
    wanted = torch.zeros(6, 64)
    for index in (1, 2):
        gate, up = F.linear(x, experts(model).gate_up_proj[index]).chunk(2, -1)
        wanted += 0.5 * F.linear(F.silu(gate) * up, experts(model).down_proj[index])
    assert torch.allclose(out, wanted, atol=1e-5)
    nowhere = experts(model)(x, torch.full((6, 2), 4), torch.ones(6, 2))
    assert torch.equal(nowhere, torch.zeros(6, 64))


def test_copies_pickles_dtypes_and_state_dicts():
    model = pyfast.quantize(mixtral())
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert type(experts(other)).__name__ == "MixtralExperts"
    other = pyfast.quantize(mixtral(seed=3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    other.to(torch.bfloat16)
    assert experts(other).gate_up_proj.dtype == torch.bfloat16
    assert torch.allclose(logits(other).float(), expected, atol=0.1)


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (["experts"], TENSORS),
        (["down_proj"], ("down_proj",)),
        (["0.mlp.experts.gate_up_proj"], ("gate_up_proj",)),
    ],
)
def test_skip_modules(skip, dense):
    model = pyfast.quantize(mixtral(), skip_modules=skip)
    assert tuple(expert_tensors(experts(model))) == dense
    assert torch.isfinite(logits(model)).all()
    left = [p for p in experts(model)._modules if p.startswith("nf4_")]
    assert len(left) == 2 - len(dense)
    with pytest.raises(TargetModuleError, match="'expert' matches no linear module"):
        pyfast.quantize(mixtral(), skip_modules=["expert"])


def test_experts_whose_size_is_no_multiple_of_a_block_stay_dense():
    model = pyfast.quantize(
        mixtral(intermediate_size=65, hidden_size=8, num_attention_heads=2, num_key_value_heads=2),
        blocksize=128,
    )
    assert len(expert_tensors(experts(model))) == 2
    assert any(isinstance(m, NF4Linear) for m in model.modules())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("fails", [2, 3, 4])
def test_a_call_that_fails_changes_nothing(fails, monkeypatch):
    """Calls: the largest tensor as a check of memory, then gate_up and down of each layer."""
    calls = []
    quantise = pyfast.methods.quantize.__globals__["quantize_experts"]

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == fails:
            raise KeyboardInterrupt
        return quantise(*args, **options)

    model = mixtral()
    before, names = fingerprint(model), [n for n, _ in model.named_parameters()]
    monkeypatch.setitem(pyfast.methods.quantize.__globals__, "quantize_experts", failing)
    with pytest.raises(KeyboardInterrupt):
        pyfast.quantize(model)
    assert fingerprint(model) == before
    assert [n for n, _ in model.named_parameters()] == names


def test_a_weight_that_is_not_finite_is_named():
    model = mixtral()
    with torch.no_grad():
        experts(model, 1).down_proj[2, 3, 4] = float("inf")
    before = fingerprint(model)
    with pytest.raises(
        NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN or inf"
    ):
        pyfast.quantize(model)
    assert fingerprint(model) == before


def test_the_report_says_what_is_dense_and_why():
    model = mixtral()
    report = str(pyfast.accelerate(model))
    assert (
        "2 x MixtralExperts: left alone: gate_up_proj, down_proj are dense: pyfast.quantize can make them "
        "NF4 (first: model.layers.0.mlp.experts)"
    ) in report
    pyfast.quantize(model, skip_modules=["1.self_attn.k_proj"])
    report = str(pyfast.accelerate(model))
    assert "pyfast serves 9 of 11 linear modules" in report
    assert "2 x MixtralExperts of gate_up_proj, down_proj: pyfast.nf4_linear" in report
    assert "1 x Linear: left alone: the output layer, which stays dense (first: lm_head)" in report
    assert (
        "1 x Linear: left alone: dense in a 4-bit model; pyfast.quantize can make it NF4 "
        "(first: model.layers.1.self_attn.k_proj)"
    ) in report


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("falcon-7b", "x FalconLinear: left alone: dense in a 4-bit model"),
        ("mixtral", "x MixtralExperts: left alone: gate_up_proj, down_proj are dense"),
        ("t5", "x Linear: left alone: dense, since the model keeps it in float32"),
    ],
)
def test_what_bitsandbytes_leaves_dense(name, words, tmp_path):
    variant(name).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path, quantization_config=config)
    if name == "falcon-7b":  # bitsandbytes makes none at all
        pyfast.quantize(model, skip_modules=["dense"])
    assert words in str(pyfast.accelerate(model))
