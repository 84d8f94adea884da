# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts' 3-D parameters: PEFT's names, outputs, gradients and files, in both directions."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterMismatchError, AdapterStateError, QuantizedMergeError
from pyfast.nn.experts import quantized_experts
from tests.family_models import assert_trains_like_peft, gradients, outputs, variant
from tests.models import VOCAB, fingerprint, plain, randomise

pytestmark = [
    # PEFT looks for the base model's config.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    # PEFT looks for the keys among modules alone, and follows them nevertheless.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "both": {"target_modules": [], "target_parameters": BOTH},
    "with attention": {"target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH},
    "no modules": {"target_parameters": BOTH},
    "gate and up": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj"],
    },
    "down": {"target_modules": [], "target_parameters": ["down_proj"]},
    "one layer": {
        "target_modules": [],
        "target_parameters": [f"model.layers.1.mlp.{name}" for name in BOTH],
    },
    "patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": BOTH,
        "rank_pattern": {r".*\.gate_up_proj": 6, "v_proj": 2},
        "alpha_pattern": {r".*\.gate_up_proj": 4},
        "use_rslora": True,
    },
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OPTIONS = {"r": 3, "lora_alpha": 5}


def pair(name="both", dtype=torch.float32):
    """Our Mixtral and PEFT's with the same random adapters."""
    options = OPTIONS | CASES[name]
    ours = pyfast.apply(variant("mixtral").to(dtype), LoraConfig(**options))
    theirs = get_peft_model(variant("mixtral").to(dtype), peft.LoraConfig(**options))
    return randomise(ours), randomise(theirs)


def experts(model, layer=0):
    return model.model.layers[layer].mlp.experts


@pytest.mark.parametrize("name", CASES)
def test_parameters_outputs_and_gradients_are_pefts(name):
    assert_trains_like_peft(*pair(name, torch.float64))


def other_family(kind):
    """A tiny model whose experts, unlike Mixtral's, are stored [experts, in, out] or have biases, or whose
    gate is another function."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixture = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    others = {
        "moe_intermediate_size": 32,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    }
    config = transformers.AutoConfig.for_model(kind, **sizes, **layers, **mixture, **others)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_experts_of_other_families(kind):
    options = OPTIONS | CASES["with attention"]
    ours = randomise(pyfast.apply(other_family(kind), LoraConfig(**options)))
    theirs = randomise(get_peft_model(other_family(kind), peft.LoraConfig(**options)))
    assert (outputs(ours) - outputs(other_family(kind))).abs().max() > 1e-3
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-5, atol=1e-5)
    got, wanted = gradients(ours, plain), gradients(theirs, plain)
    assert got.keys() == wanted.keys()
    for path, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[path], rtol=1e-4, atol=1e-5)
    expected = outputs(ours)
    torch.testing.assert_close(outputs(pyfast.merge(ours)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whatever_implementation_the_base_has(implementation):
    ours, theirs = pair("with attention")
    expected = outputs(ours)
    for model in (ours, theirs):
        model.set_experts_implementation(implementation)
    assert torch.equal(outputs(ours), expected)
    assert torch.allclose(outputs(theirs), expected, atol=1e-5)


def test_bfloat16_has_float32_adapters_as_pefts():
    ours, theirs = pair(dtype=torch.bfloat16)
    dtypes = {plain(n): p.dtype for n, p in theirs.named_parameters() if "lora_" in n}
    assert dtypes == {n: p.dtype for n, p in ours.named_parameters() if "lora_" in n}
    assert torch.allclose(outputs(ours), outputs(theirs), atol=3e-2)


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_ours_and_we_pefts(name, tmp_path):
    ours, theirs = pair(name)
    pyfast.save_adapter(ours, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(variant("mixtral"), tmp_path / "ours")
    assert torch.allclose(outputs(loaded), outputs(ours), atol=1e-5)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(theirs)
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[key], wanted[key]) for key in stored)
    theirs.save_pretrained(tmp_path / "theirs")
    back = pyfast.load_adapter(variant("mixtral"), tmp_path / "theirs", "x", trainable=True)
    assert torch.allclose(outputs(back), outputs(theirs), atol=1e-5)
    pyfast.save_adapter(back, tmp_path / "again", "x")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)


def test_the_file_of_experts_that_peft_made_of_their_old_names(tmp_path):
    """PEFT turns w1, w2 and w3 into the parameters, with twice the rank for gate and up."""
    theirs = get_peft_model(
        variant("mixtral"), peft.LoraConfig(target_modules=["w1", "w2", "w3"], r=2, lora_alpha=3)
    )
    randomise(theirs).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["rank_pattern"] == {r".*\.gate_up_proj": 4}
    ours = pyfast.load_adapter(variant("mixtral"), tmp_path)
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["both", "with attention", "down"])
def test_merging(name, tmp_path):
    ours, theirs = pair(name)
    before = outputs(ours)
    weights = {n: p.clone() for n, p in ours.named_parameters()}
    with pyfast.adapters_disabled(ours):
        base = outputs(ours)
    assert torch.equal(base, outputs(variant("mixtral")))
    pyfast.merge(ours)
    assert torch.allclose(outputs(ours), before, atol=1e-5)
    merged = theirs.merge_and_unload()
    for layer in range(2):
        for parameter in ("gate_up_proj", "down_proj"):
            mine, other = experts(ours, layer), experts(merged, layer)
            while hasattr(mine, "base_layer"):
                mine = mine.base_layer
            torch.testing.assert_close(getattr(mine, parameter), getattr(other, parameter))
    with pyfast.adapters_disabled(ours):
        assert torch.equal(outputs(ours), base)
    pyfast.unmerge(ours)
    assert torch.equal(outputs(ours), before)
    assert all(torch.equal(p, weights[n]) for n, p in ours.named_parameters())
    pyfast.unload(pyfast.merge(ours)).save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert torch.allclose(outputs(again), before, atol=1e-5)


def dequantised(model):
    """A dense twin of a model in NF4."""
    fresh = variant("mixtral")
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, tensor in quantized_experts(module).items():
                fresh.get_submodule(path).get_parameter(name).copy_(tensor.dense())
    return fresh


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", ["both", "gate and up", "down"])
def test_on_nf4_experts(name, nested, tmp_path):
    def base():
        return pyfast.quantize(variant("mixtral"), nested=nested, skip_modules=ATTENTION)

    options = OPTIONS | CASES[name]
    theirs = get_peft_model(dequantised(base()), peft.LoraConfig(**options))
    ours = pyfast.apply(base(), LoraConfig(**options))
    for model in (ours, theirs):
        randomise(model)
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=1e-5)
    got, wanted = gradients(ours, plain), gradients(theirs, plain)
    assert got.keys() == wanted.keys()
    for path, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[path], rtol=1e-4, atol=1e-5)
    pyfast.save_adapter(ours, tmp_path)
    assert torch.equal(outputs(pyfast.load_adapter(base(), tmp_path)), outputs(ours))
    before = fingerprint(ours)
    with pytest.raises(QuantizedMergeError, match=r"NF4 weights of 'model\.layers\.0\.mlp\.exp"):
        pyfast.merge(ours)
    assert fingerprint(ours) == before


def test_experts_of_which_one_parameter_is_nf4():
    def base():
        return pyfast.quantize(variant("mixtral"), skip_modules=[*ATTENTION, "down_proj"])

    ours = pyfast.apply(base(), LoraConfig(**OPTIONS | CASES["both"]))
    theirs = get_peft_model(dequantised(base()), peft.LoraConfig(**OPTIONS | CASES["both"]))
    for model in (ours, theirs):
        randomise(model)
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=1e-5)


def test_several_adapters_switch_and_leave():
    options = OPTIONS | CASES["with attention"]
    ours, theirs = pair("with attention")
    pyfast.apply(ours, LoraConfig(**options | {"r": 2}), adapter_name="b")
    theirs.add_adapter("b", peft.LoraConfig(**options | {"r": 2}))
    for model in (ours, theirs):
        randomise(model, seed=4)
    for names in (["b"], ["default", "b"], ["default"]):
        pyfast.set_adapter(ours, names)
        theirs.base_model.set_adapter(names)
        assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(outputs(other), outputs(ours))
    pyfast.delete_adapter(ours, "default")
    pyfast.set_adapter(ours, "b")
    theirs.base_model.set_adapter("b")
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-5)
    with pytest.raises(
        AdapterStateError, match=r"have adapters on \['gate_up_proj', 'down_proj'\]"
    ):
        pyfast.apply(ours, LoraConfig(**OPTIONS | CASES["down"]), adapter_name="c")
    pyfast.delete_adapter(ours, "b")
    assert torch.equal(outputs(ours), outputs(variant("mixtral")))
    assert {n for n, _ in ours.named_parameters()} == {
        n for n, _ in variant("mixtral").named_parameters()
    }
    assert type(experts(ours)) is type(experts(variant("mixtral")))


def test_experts_alone_by_their_name(tmp_path):
    """A string, as "all-linear" is one."""
    ours = randomise(
        pyfast.apply(variant("mixtral"), LoraConfig(target_modules="experts", **OPTIONS))
    )
    pyfast.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(variant("mixtral"), tmp_path)
    torch.testing.assert_close(outputs(theirs), outputs(ours))
    assert torch.equal(outputs(pyfast.load_adapter(variant("mixtral"), tmp_path)), outputs(ours))


def test_routers_in_a_file_are_named_with_what_to_do(tmp_path):
    """PEFT's "all-linear" adapts them, whatever exclude_modules says; with the layers named it does not."""
    options = OPTIONS | {"target_modules": "all-linear", "exclude_modules": ["gate"]}
    get_peft_model(variant("mixtral"), peft.LoraConfig(**options)).save_pretrained(tmp_path / "all")
    model = variant("mixtral")
    before = fingerprint(model)
    with pytest.raises(AdapterMismatchError) as caught:
        pyfast.load_adapter(model, tmp_path / "all")
    assert str(caught.value) == (
        f"[PF002] adapter '{tmp_path / 'all'}' does not fit MixtralForCausalLM: 4 of its 28 tensors are of 2 "
        "modules that pyfast has no adapters for (first: 'model.layers.0.mlp.gate', a MixtralTopKRouter). "
        "The adapter was NOT applied. Fix: train it without them, with the layers named in target_modules "
        "and target_parameters in the place of 'all-linear'"
    )
    assert fingerprint(model) == before
    named = OPTIONS | {"target_modules": ATTENTION, "target_parameters": BOTH}
    theirs = randomise(get_peft_model(variant("mixtral"), peft.LoraConfig(**named)))
    theirs.save_pretrained(tmp_path / "named")
    ours = pyfast.load_adapter(model, tmp_path / "named")
    torch.testing.assert_close(outputs(ours), outputs(theirs))


def test_other_surplus_keys_are_called_unexpected(tmp_path):
    """A module that is not there, and a linear that the config does not name, are no limit of ours."""
    pyfast.save_adapter(
        pyfast.apply(variant("mixtral"), LoraConfig(target_modules=["q_proj"])), tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for path in (
        "layers.7.self_attn.q_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.experts",
        "rest",
    ):
        key = f"base_model.model.model.{path}.lora_A.weight"
        save_file(tensors | {key: torch.zeros(8, 64)}, file)
        with pytest.raises(AdapterMismatchError, match="1 unexpected"):
            pyfast.load_adapter(variant("mixtral"), tmp_path)
