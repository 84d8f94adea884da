# SPDX-License-Identifier: Apache-2.0
"""Mixtures that bitsandbytes quantised under transformers 4, where each expert had linears of its own."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyfast
from pyfast.errors import PyfastError, QuantStateError, UnsupportedError
from pyfast.integrations.nf4_reading import ReadExperts
from pyfast.nn import NF4Linear, NF4Tensor
from pyfast.nn.nf4 import STATE_KEY
from tests.family_models import variant
from tests.integrations.checkpoints import (
    assert_equal_files,
    assert_equal_states,
    load,
    load_nf4,
    quantization,
    raw,
    reread,
)
from tests.integrations.test_hostile_nf4 import facts, mutated, states
from tests.models import logits

bnb = pytest.importorskip("bitsandbytes")

EXPERTS = 4
# The dense matrices of an expert by the parameter that holds them all, in transformers 5 order.
MATRICES = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "qwen3_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}


def model_of(kind, **changes):
    if kind == "mixtral":
        # On the CPU bitsandbytes misreads rows that are no multiple of a block.
        return variant("mixtral", **{"intermediate_size": 128} | changes)
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
    return variant("qwen3", model_type="qwen3_moe", tie_word_embeddings=False, **sizes, **changes)


def linear4bit(weight, nested, blocksize=64):
    """The state of bitsandbytes' layer for a dense weight: key to tensor."""
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )
    parts = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts}


def written(directory, kind="mixtral", *, nested=False, blocksize=64, skip=("lm_head",), **changes):
    """A checkpoint with the names and tensors of transformers 4 and bitsandbytes; and the same model dense,
    of the values that bitsandbytes dequantises to."""
    model = model_of(kind, **changes)
    model.save_pretrained(directory)  # dense experts are stored one by one
    file, dense = directory / "model.safetensors", {}
    tensors = load_file(file)
    for key in list(tensors):
        layer, _, name = key.rpartition(".")
        if tensors[key].ndim != 2 or name != "weight" or "embed" in key or layer.endswith(skip):
            continue
        held = linear4bit(tensors.pop(key), nested, blocksize)
        tensors |= {f"{layer}.{name}": tensor for name, tensor in held.items()}
        state = bnb.functional.QuantState.from_dict(
            {k.removeprefix("weight."): v for k, v in held.items() if k != "weight"},
            torch.device("cpu"),
        )
        dense[key] = bnb.functional.dequantize_4bit(held["weight"], state)
    plain = {key: tensor for key, tensor in tensors.items() if ".weight." not in key} | dense
    (directory / "plain").mkdir()
    save_file(plain, directory / "plain" / "model.safetensors", metadata={"format": "pt"})
    (directory / "plain" / "config.json").write_text((directory / "config.json").read_text())
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return tensors, load(directory / "plain")


def expert_keys(tensors, layer, names, index):
    where = (
        "block_sparse_moe"
        if f"model.layers.{layer}.block_sparse_moe.gate.weight" in tensors
        else "mlp"
    )
    return [f"model.layers.{layer}.{where}.experts.{index}.{name}.weight" for name in names]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_bytes_are_those_of_the_file(kind, nested, tmp_path):
    tensors, plain = written(tmp_path, kind, nested=nested)
    model = reread(tmp_path)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    for path, module in model.named_modules():
        if isinstance(module, NF4Tensor) and "nf4_" in path:
            start, _, name = path.rpartition(".nf4_")
            keys = [
                key
                for index in range(EXPERTS)
                for key in expert_keys(tensors, start.split(".")[2], MATRICES[kind][name], index)
            ]
            assert torch.equal(module.weight, torch.cat([tensors[key] for key in keys]))
            assert torch.equal(module.dense(), plain.get_submodule(start).get_parameter(name))
            assert module.nested_absmax is None
            if not nested:
                scales = torch.cat([tensors[f"{key}.absmax"] for key in keys])
                assert torch.equal(raw(module.absmax), raw(scales))
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 8
    assert sum(isinstance(module, NF4Tensor) for module in model.modules()) == 12
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        # The router, a linear then, is a plain parameter now.
        assert torch.equal(layer.mlp.gate.weight, other.mlp.gate.weight)


def test_saved_and_read_again(tmp_path):
    _, plain = written(tmp_path / "theirs")
    model = reread(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert quantization(tmp_path / "ours")["quant_method"] == "pyfast_nf4"
    again = load(tmp_path / "ours")
    assert_equal_states(again, model)
    again.save_pretrained(tmp_path / "second")
    assert_equal_files(tmp_path / "second", tmp_path / "ours")
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert_equal_files(tmp_path / "dense", tmp_path / "theirs" / "plain")
    assert_equal_states(load(tmp_path / "dense"), plain)


def test_experts_that_were_left_dense(tmp_path):
    _, plain = written(tmp_path, skip=("lm_head", "w1", "w2", "w3"))
    model = reread(tmp_path, dtype=torch.bfloat16)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name, parameter in other.mlp.experts.named_parameters():
            assert torch.equal(layer.mlp.experts.get_parameter(name), parameter.bfloat16())
        assert torch.equal(layer.mlp.gate.weight, other.mlp.gate.weight.bfloat16())
        assert type(layer.self_attn.q_proj) is NF4Linear
    assert torch.isfinite(logits(model)).all()


def test_adapters_train_on_them(tmp_path):
    written(tmp_path, nested=True)
    model = pyfast.apply(reread(tmp_path), pyfast.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.train()
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 4
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


# --- what is refused -----------------------------------------------------------------------------


def test_experts_whose_blocks_cross_each_other(tmp_path):
    written(tmp_path, blocksize=4096, intermediate_size=96)
    with pytest.raises(UnsupportedError, match=r"experts\.0\.w1\.weight has 6144 weights, .* 4096"):
        reread(tmp_path)


KEY = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
DAMAGE = {
    "packed gone": ("", None, "holds 4 experts, but 3 of"),
    "absmax gone": (".absmax", None, "holds 4 experts, but 3 of"),
    "absmax cut": (".absmax", lambda t: t[:-1].clone(), r"experts\.2\.w3"),
    "absmax nan": (".absmax", lambda t: t * float("nan"), r"experts\.2\.w3.* NaN"),
    "three axes": (*facts(shape=[2, 64, 64]), "is not .out_features"),
    "other shape": (*facts(shape=[64, 128]), "differ in shape"),
    "other dtype": (*facts(dtype="float16"), "differ in shape, blocksize or dtype"),
    "other type": (*facts(quant_type="fp4"), "quant_type is 'fp4'"),
    "no json": (f".{STATE_KEY}", lambda t: t[:-1].clone(), "is not JSON"),
    "dense among them": ("*", lambda t: torch.zeros(128, 64), "holds 4 experts, but 3 of"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts")
    return directory, written(directory)[0]


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files(case, source):
    (name, change, told), (directory, good) = case, source
    bad = dict(good)
    if name == "*":
        bad = {k: t for k, t in good.items() if not k.startswith(f"{KEY}.")} | {KEY: change(None)}
    elif change is None:
        del bad[KEY + name]
    else:
        bad[KEY + name] = change(good[KEY + name])
    save_file(bad, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantStateError, match=rf"layers\.1\.mlp\.experts\.gate_up_proj: .*{told}"):
        reread(directory)


def test_fewer_experts_than_the_config_says(source):
    directory, good = source
    bad = {key: tensor for key, tensor in good.items() if ".experts.3." not in key}
    save_file(bad, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QuantStateError, match=r"shape \[3, 256, 64\], the model needs \[4, 256, 64\]"
    ):
        reread(directory)


def test_the_bytes_are_those_that_our_quantizer_makes(tmp_path):
    """Flat scales: stacked experts have the blocks that each of them has by itself."""
    written(tmp_path / "theirs")
    model_of("mixtral").save_pretrained(tmp_path / "dense")
    ours = load_nf4(tmp_path / "dense", nested=False).state_dict()
    for key, tensor in reread(tmp_path / "theirs").state_dict().items():
        if ".nf4_" in key and not key.endswith(STATE_KEY):
            assert torch.equal(raw(tensor), raw(ours[key])), key


def test_mutated_states_of_one_expert():
    stem, rng, refused = ".experts.*.w2.weight", random.Random(0), 0
    reading = ReadExperts(None, SimpleNamespace(_original_source_patterns=[stem]))
    good = {nested: states(nested)[1] for nested in (True, False)}
    for _ in range(2000):
        whole = good[rng.random() < 0.5]
        tensors = {}
        for state in (whole, mutated(whole, rng), whole):
            for key, tensor in state.items():
                tensors.setdefault(stem + key.removeprefix("weight"), []).append(tensor)
        try:
            held = reading._stacked(tensors, "experts.down_proj", (3, 64, 128))
        except PyfastError:
            refused += 1
        else:
            assert torch.isfinite(held.dense()).all()
    assert 1200 < refused < 2000
