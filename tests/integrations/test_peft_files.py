# SPDX-License-Identifier: Apache-2.0
"""Adapter files both ways: PEFT reads ours, we read PEFT's, keys and logits equal."""

import contextlib
import json

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import LoraConfig
from pyfast.errors import EmbeddingNotSavedError, UnsupportedError
from tests.models import VOCAB, fingerprint, gpt2, llama, logits, plain, randomise, train, twin

pytestmark = [
    # PEFT looks for the base model's config.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

CASES = {
    "default": (llama, {}),
    "tied": (lambda: llama(tied=True), {"target_modules": ["q_proj", "o_proj"]}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}),
    "regex": (llama, {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj"}),
    "one layer": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "patterns": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r".*1\.mlp.*": 5},
            "alpha_pattern": {"down_proj": 3, r"^model\.layers\.0\.self_attn\..*": 7},
            "use_rslora": True,
        },
    ),
    "saved": (llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved norms": (llama, {"modules_to_save": ["norm"]}),
    "excluded": (llama, {"target_modules": "all-linear", "exclude_modules": r".*k_proj"}),
    "gpt2": (gpt2, {"fan_in_fan_out": True}),
    "gpt2 all": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 saved": (gpt2, {"fan_in_fan_out": True, "modules_to_save": ["wte", "ln_f"]}),
    "bf16": (lambda: llama().to(torch.bfloat16), {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case, tmp_path):
    make, options = CASES[case]
    with pytest.warns(match="'lm_head'") if case == "gpt2 saved" else contextlib.nullcontext():
        model = randomise(pyfast.apply(make(), LoraConfig(**options)))
    pyfast.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-6 if case != "bf16" else 2e-2)
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == expected.keys() == pyfast.adapter_state_dict(model).keys()
    for key, tensor in expected.items():
        assert stored[key].dtype == tensor.dtype, key
        assert torch.equal(stored[key], tensor), key
    # Once more through PEFT and back: equal bytes.
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    back = pyfast.load_adapter(make(), tmp_path / "again")
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("case", CASES)
def test_we_load_pefts(case, tmp_path):
    make, options = CASES[case]
    theirs = randomise(get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    theirs.save_pretrained(tmp_path)
    model = make()
    assert pyfast.load_adapter(model, tmp_path, adapter_name="x") is model
    assert torch.allclose(logits(theirs), logits(model), atol=1e-6 if case != "bf16" else 2e-2)
    assert not any(p.requires_grad for p in model.parameters())
    trainable = pyfast.load_adapter(make(), tmp_path, trainable=True)
    mine = {n for n, p in trainable.named_parameters() if p.requires_grad}
    assert mine == {plain(n) for n, p in theirs.named_parameters() if p.requires_grad}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pyfast.save_adapter(trainable, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type"):
        assert ours[key] == config[key], key


@pytest.mark.parametrize("case", ["default", "patterns", "saved", "gpt2"])
def test_config_objects_of_peft_are_accepted(case):
    make, options = CASES[case]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    theirs = randomise(get_peft_model(make(), config))
    ours = randomise(pyfast.apply(make(), peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)


def test_embeddings_that_peft_adds_to_its_file(tmp_path):
    options = {"target_modules": ["lm_head", "q_proj"]}
    theirs = randomise(get_peft_model(llama(), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("embed_tokens" in key or "base_layer" in key for key in keys)
    model = pyfast.load_adapter(llama(), tmp_path)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    other = llama(seed=5)
    before = fingerprint(other)
    with pytest.raises(pyfast.errors.AdapterMismatchError, match="a weight of the base model"):
        pyfast.load_adapter(other, tmp_path)
    assert fingerprint(other) == before


def test_sequence_classification(tmp_path):
    config = llama().config
    config.num_labels = 3

    def make():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(config).eval()

    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}
    theirs = randomise(get_peft_model(make(), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert "classifier" in saved  # PEFT writes names that this model does not have
    model = pyfast.load_adapter(make(), tmp_path)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "orthogonal"}, {"lora_dropout": 1.0}, {"lora_alpha": 0}],
    ids=str,
)
def test_settings_that_matter_for_training_alone(options, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], **options)
    theirs = randomise(get_peft_model(llama(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = pyfast.load_adapter(llama(), tmp_path / "theirs")
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    pyfast.save_adapter(model, tmp_path / "ours")
    back = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.allclose(logits(back), logits(theirs), atol=1e-6)
    pyfast.merge(model)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-5)


UNSERVED = {
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["up_proj.weight"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 1}},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "olora"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("field", UNSERVED)
def test_unserved_settings_are_refused_by_name(field):
    config = peft.LoraConfig(target_modules=["q_proj"], **UNSERVED[field])
    model = llama()
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=f"{field}="):
        pyfast.apply(model, config)
    assert fingerprint(model) == before


def test_other_methods_of_peft_are_refused():
    with pytest.raises(UnsupportedError, match=r"LoHaConfig \(peft_type 'LOHA'\) is not served"):
        pyfast.apply(llama(), peft.LoHaConfig(target_modules=["q_proj"]))


def test_several_adapters_and_names(tmp_path):
    model = pyfast.apply(llama(), LoraConfig(), adapter_name="a")
    pyfast.apply(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=2), adapter_name="b")
    randomise(model)
    for name in "ab":
        pyfast.save_adapter(model, tmp_path / name, name)
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="one")
    theirs.load_adapter(tmp_path / "b", "two")
    back = pyfast.load_adapter(llama(), tmp_path / "a", "x")
    pyfast.load_adapter(back, tmp_path / "b", "default")
    for name, peft_name, new in (("a", "one", "x"), ("b", "two", "default")):
        pyfast.set_adapter(model, name)
        theirs.set_adapter(peft_name)
        pyfast.set_adapter(back, new)
        assert torch.allclose(logits(theirs), logits(model), atol=1e-6)
        assert torch.equal(logits(back), logits(model))


def test_name_that_ends_another_path(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = torch.nn.Linear(4, 4)
            self.block = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.block["fc"](self.fc(x))

    model = pyfast.apply(Net(), LoraConfig(target_modules="fc", r=2))
    assert len(pyfast.adapter_parameters(model)) == 2
    pyfast.save_adapter(randomise(model), tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(pyfast.load_adapter(Net(), tmp_path)(x), model(x))
    assert torch.allclose(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x), atol=1e-6)


def test_training_goes_on_after_a_reload(tmp_path):
    model = pyfast.apply(llama(), LoraConfig())
    train(model)
    pyfast.save_adapter(model, tmp_path)
    back = pyfast.load_adapter(llama(), tmp_path, trainable=True)
    assert train(back) == train(model)


def test_4bit_base_and_resaving_over_old_files(tmp_path):
    model = randomise(pyfast.apply(pyfast.quantize(llama()), LoraConfig(r=2)))
    pyfast.save_adapter(model, tmp_path)
    randomise(model, seed=9)
    pyfast.save_adapter(model, tmp_path)
    back = pyfast.load_adapter(pyfast.quantize(llama()), tmp_path)
    assert torch.equal(logits(back), logits(model))


def test_save_pretrained_of_a_model(tmp_path):
    model = randomise(pyfast.apply(llama(), LoraConfig()))
    pyfast.apply(model, LoraConfig(target_modules=["up_proj"]), adapter_name="b")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "b",
    }
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank").exists()
    with pytest.raises(UnsupportedError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    pyfast.unload(model)
    model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))


def test_merged_model_is_saved_and_read_by_transformers(tmp_path):
    model = randomise(pyfast.apply(llama(tied=True), LoraConfig(target_modules="all-linear")))
    pyfast.unload(pyfast.merge(model))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_transformers_finds_the_base_of_our_adapter(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(pyfast.apply(base, LoraConfig()))
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_vocabulary(tied, tmp_path):
    llama(tied=tied).save_pretrained(tmp_path / "base")

    def resized():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        return model

    model = pyfast.apply(resized(), LoraConfig())
    with pytest.raises(EmbeddingNotSavedError) as caught:
        pyfast.save_adapter(model, tmp_path / "a")
    names = "embed_tokens" if tied else "embed_tokens and lm_head"
    listed = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    assert str(caught.value) == (
        f"[PF006] the vocabulary was resized 96 -> 100, but {names} {'is' if tied else 'are'} not "
        "part of adapter 'default'; reloading would give random rows. Nothing was written. Fix: "
        f"modules_to_save={listed} before training"
    )
    assert not (tmp_path / "a").exists()
    both = LoraConfig(modules_to_save=["embed_tokens", "lm_head"])
    model = randomise(pyfast.apply(resized(), both))
    pyfast.save_adapter(model, tmp_path / "a")
    back = pyfast.load_adapter(resized(), tmp_path / "a")
    assert torch.equal(logits(back), logits(model))


def test_not_finite_is_not_written(tmp_path):
    model = pyfast.apply(llama(), LoraConfig())
    model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(pyfast.errors.NonFiniteError, match="has 1 NaN or infinite values"):
        pyfast.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = randomise(pyfast.apply(llama(), LoraConfig()))
    pyfast.save_adapter(model, tmp_path)
    names = ("adapter_config.json", "adapter_model.safetensors")
    before = [(tmp_path / name).read_bytes() for name in names]
    randomise(model, seed=8)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyfast.integrations.adapter_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pyfast.save_adapter(model, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_models_that_carry_pefts_adapters_are_refused():
    model = get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    before = fingerprint(model)
    for call in (
        pyfast.quantize,
        lambda m: pyfast.apply(m, LoraConfig(target_modules="all-linear")),
    ):
        with pytest.raises(pyfast.errors.AdapterStateError, match=r"pyfast\.accelerate\(model\)"):
            call(model)
        assert fingerprint(model) == before


def test_transformers_flag_follows_the_adapters():
    model = pyfast.apply(llama(), LoraConfig())
    assert model._hf_peft_config_loaded
    pyfast.unload(model)
    assert not model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True  # as transformers' own add_adapter does
    assert model._hf_peft_config_loaded


def test_twins_do_not_share():
    model = pyfast.apply(llama(), LoraConfig())
    other = twin(model)
    randomise(other)
    pyfast.delete_adapter(other, "default")
    assert len(pyfast.adapter_parameters(model)) == 8


def test_files_of_others_have_no_checksum(tmp_path):
    model = randomise(pyfast.apply(llama(), LoraConfig()))
    pyfast.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor * 2 for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    pyfast.load_adapter(llama(), tmp_path)
