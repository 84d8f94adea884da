# SPDX-License-Identifier: Apache-2.0
"""LoRA on embeddings and output layers: PEFT's outputs, gradients and files, in both directions."""

import contextlib
import json

import accelerate
import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterStateError, TargetModuleError, UnsupportedError
from tests.family_models import assert_trains_like_peft, batch, outputs, variant
from tests.models import fingerprint, logits, plain, randomise

pytestmark = [
    # PEFT looks for the base model's config.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]
TIED = "shares its weight with"
# Variant, what LoRA gets beside the rank, and whether the embedding is tied.
CASES = {
    "llama": ("llama", ["embed_tokens", "lm_head", "q_proj"], False),
    "embedding alone": ("llama", ["embed_tokens"], False),
    "tied": ("llama-mha-tied", ["embed_tokens", "lm_head", "q_proj"], True),
    "regex": ("mistral", r"model\.embed_tokens|.*\.0\..*q_proj|lm_head", False),
    "gpt2": ("gpt2", ["wte", "wpe", "c_attn"], True),
    "gpt_neox": ("gpt_neox", ["embed_in", "lm_head", "query_key_value"], False),
    "falcon": ("falcon-7b", ["word_embeddings", "query_key_value"], True),
    "gemma": ("gemma", ["embed_tokens", "v_proj"], True),
    "gemma3": ("gemma3", ["embed_tokens", "lm_head"], True),
    "recurrent_gemma": ("recurrent_gemma", ["embed_tokens", "linear_x"], True),
    "t5": ("t5", ["embed_tokens", "relative_attention_bias", "lm_head", "q"], True),
}
OPTIONS = {"r": 4, "lora_alpha": 6}


def case(name):
    kind, targets, tied = CASES[name]
    options = dict(OPTIONS, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    expected = pytest.warns(match=TIED) if tied else contextlib.nullcontext()
    return kind, options, expected


def pair(name, dtype=torch.float32, **more):
    """Our model and PEFT's with the same random adapters."""
    kind, options, expected = case(name)
    with expected:
        ours = pyfast.apply(variant(kind).to(dtype), LoraConfig(**options, **more))
    theirs = get_peft_model(variant(kind).to(dtype), peft.LoraConfig(**options, **more))
    return randomise(ours), randomise(theirs)


@pytest.mark.parametrize("name", CASES)
def test_parameters_outputs_and_gradients_are_pefts(name):
    assert_trains_like_peft(*pair(name, torch.float64))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_bfloat16_has_float32_adapters_as_pefts(name):
    ours, theirs = pair(name, torch.bfloat16)
    dtypes = {plain(n): p.dtype for n, p in theirs.named_parameters() if "lora_" in n}
    assert dtypes == {n: p.dtype for n, p in ours.named_parameters() if "lora_" in n}
    assert torch.allclose(outputs(ours), outputs(theirs), atol=3e-2)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_untrained_adapters_are_pefts(init):
    torch.manual_seed(3)
    layer = pyfast.apply(
        variant("llama"), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=init)
    ).model.embed_tokens
    theirs = get_peft_model(
        variant("llama"), peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=init)
    ).base_model.model.model.embed_tokens
    for container in ("lora_embedding_A", "lora_embedding_B"):
        mine, other = (getattr(each, container)["default"] for each in (layer, theirs))
        assert bool(mine.any()) is bool(other.any())
        assert torch.allclose(mine.std(), other.std(), rtol=0.2)


def test_padding_and_dropout_as_pefts():
    """The row of the padding id gets no gradient, and dropout has no part in embeddings."""
    ids = torch.tensor([[5, 0, 7, 7, 0, 5]])
    found = []
    for model in pair("embedding alone", lora_dropout=0.5):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {plain(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(grads["model.embed_tokens.lora_embedding_A.default"])
    assert not found[0][:, 0].any()
    assert found[0][:, 5].any()
    assert torch.allclose(*found, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_ours_and_we_pefts(name, tmp_path):
    kind, ours, theirs = CASES[name][0], *pair(name)
    pyfast.save_adapter(ours, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(variant(kind), tmp_path / "ours")
    assert torch.allclose(outputs(loaded), outputs(ours), atol=1e-5)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in wanted.items()}
    theirs.save_pretrained(tmp_path / "theirs")  # with copies of the embeddings
    back = pyfast.load_adapter(variant(kind), tmp_path / "theirs", "x", trainable=True)
    assert torch.allclose(outputs(back), outputs(theirs), atol=1e-5)
    pyfast.save_adapter(back, tmp_path / "again", "x")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], wanted[key]) for key in again)


def test_files_name_the_embedding():
    ours, _ = pair("llama")
    assert sorted(pyfast.adapter_state_dict(ours))[:3] == [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ]


@pytest.mark.parametrize("name", ["llama", "tied", "gemma", "gpt2", "t5"])
def test_merged_models_give_the_same_and_are_read_by_transformers(name, tmp_path):
    ours, _ = pair(name)
    before = outputs(ours)
    weights = {n: p.clone() for n, p in ours.named_parameters()}
    with pyfast.adapters_disabled(ours):
        base = outputs(ours)
    pyfast.merge(ours)
    assert torch.allclose(outputs(ours), before, atol=1e-5)
    with pyfast.adapters_disabled(ours):
        assert torch.equal(outputs(ours), base)
    pyfast.unmerge(ours)
    assert torch.equal(outputs(ours), before)
    assert all(torch.equal(p, weights[n]) for n, p in ours.named_parameters())
    pyfast.unload(pyfast.merge(ours)).save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert torch.allclose(outputs(again), before, atol=1e-5)


def test_patterns_of_rank_and_a_second_adapter(tmp_path):
    options = dict(OPTIONS, target_modules=["embed_tokens", "q_proj"], use_rslora=True)
    options |= {"rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"q_proj": 3}}
    ours = pyfast.apply(variant("llama"), LoraConfig(**options))
    theirs = get_peft_model(variant("llama"), peft.LoraConfig(**options))
    for model in (ours, theirs):
        randomise(model)
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-6)
    second = {"target_modules": ["embed_tokens"], "r": 3}
    pyfast.apply(ours, LoraConfig(**second), adapter_name="b")
    theirs.add_adapter("b", peft.LoraConfig(**second))
    for model in (ours, theirs):
        randomise(model, seed=4)
    pyfast.set_adapter(ours, ["default", "b"])
    theirs.base_model.set_adapter(["default", "b"])
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-6)
    pyfast.save_adapter(ours, tmp_path, "b")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "embed_tokens"
    ]
    pyfast.delete_adapter(ours, "default")
    pyfast.delete_adapter(ours, "b")
    assert type(ours.model.embed_tokens) is torch.nn.Embedding


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_trainer_resumes_with_checkpointing(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in batch(variant("llama"))["input_ids"]]

    def run(name, resume=None):
        torch.manual_seed(0)
        config = LoraConfig(**OPTIONS, target_modules=["embed_tokens", "lm_head", "q_proj"])
        model = pyfast.apply(variant("llama"), config)
        model.gradient_checkpointing_enable()
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), max_steps=4, save_steps=2, learning_rate=1e-2, use_cpu=True,
            per_device_train_batch_size=2, report_to=[],
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=data).train(
            resume_from_checkpoint=resume
        )
        return pyfast.adapter_state_dict(model)

    whole = run("a")
    resumed = run("b", str(tmp_path / "a" / "checkpoint-2"))
    assert whole["base_model.model.model.embed_tokens.lora_embedding_A"].any()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


class OwnForward(torch.nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


def own_forward():
    model = variant("llama")
    model.model.embed_tokens.__class__ = OwnForward
    return model


def largest_norm():
    model = variant("llama")
    model.model.embed_tokens.max_norm = 1.0
    return model


REFUSED = {
    "never called": (
        lambda: variant("t5"),
        LoraConfig(target_modules=["q", "shared"]),
        TargetModuleError,
        "'shared' holds the weight of other embeddings and is never called itself",
    ),
    "DoRA": (
        lambda: variant("llama"),
        LoraConfig(target_modules=["embed_tokens"], use_dora=True),
        UnsupportedError,
        "'model.embed_tokens' is an embedding, which use_dora=True does not serve",
    ),
    "a forward of its own": (
        own_forward,
        LoraConfig(target_modules=["embed_tokens"]),
        UnsupportedError,
        "a OwnForward; only linear layers",
    ),
    "max_norm": (
        largest_norm,
        LoraConfig(target_modules=["embed_tokens"]),
        UnsupportedError,
        "a Embedding; only linear layers .* and LoRA's embeddings and experts",
    ),
    "ensure_weight_tying": (
        lambda: variant("llama-mha-tied"),
        peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True),
        UnsupportedError,
        "ensure_weight_tying=True is not served",
    ),
    "IA3": (
        lambda: variant("llama"),
        pyfast.IA3Config(target_modules=["embed_tokens"], feedforward_modules=[]),
        UnsupportedError,
        "'embed_tokens' names 'model.embed_tokens', a Embedding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, config, error, text = REFUSED[name]
    model = make()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        pyfast.apply(model, config)
    assert fingerprint(model) == before


def test_offloading():
    """Hooks bring the embedding's weight for its call; adapters have no call that could bring them."""
    model, _ = pair("embedding alone")
    expected = logits(model)
    accelerate.cpu_offload(model.model.embed_tokens.base_layer, torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    model, _ = pair("embedding alone")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="leave adapters on their device"):
        logits(model)
    bare = variant("llama")
    accelerate.cpu_offload(bare, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"'model\.embed_tokens\.weight' lies on the meta"):
        pyfast.apply(bare, LoraConfig(target_modules=["embed_tokens"]))
