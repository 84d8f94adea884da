# SPDX-License-Identifier: Apache-2.0
"""Every refused call: the error's class and text, and that it left the model as it was."""

import time

import pytest
import torch
from torch import nn

import pyfast
from pyfast import LoraConfig, SFTConfig
from pyfast.errors import (
    AdapterStateError,
    ConfigError,
    NonFiniteError,
    TargetModuleError,
    UnsafeFileError,
    UnsupportedError,
)
from tests.models import fingerprint, llama, randomise


def refused(model, error, call):
    """The message of the error that the call raises; the model must be unchanged."""
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        call()
    assert fingerprint(model) == before
    assert isinstance(caught.value, pyfast.PyfastError)
    return str(caught.value)


def test_target_texts():
    model = llama()

    def text(**options):
        return refused(model, TargetModuleError, lambda: pyfast.apply(model, LoraConfig(**options)))

    assert text(target_modules=["q_proj", "v_porj"]) == (
        "[PF001] target_modules: 'v_porj' matches no module of LlamaForCausalLM (1 of 2 names; "
        "'q_proj' matched 2). Closest: 'v_proj'. Nothing was changed. "
        "Fix: target_modules=['q_proj', 'v_proj'], or allow_unmatched=True"
    )
    assert text(target_modules=["xyzzy"]) == (
        "[PF001] target_modules: 'xyzzy' matches no module of LlamaForCausalLM (1 of 1 names). "
        "Nothing was changed. Names it has: ['down_proj', 'embed_tokens', 'gate_proj', 'k_proj', "
        "'layers', 'lm_head', 'mlp', 'model', 'o_proj', 'q_proj', 'self_attn', 'up_proj'], or "
        "allow_unmatched=True"
    )
    assert text(modules_to_save=["lm_hed"]) == (
        "[PF001] modules_to_save: 'lm_hed' matches no module of LlamaForCausalLM (1 of 1 names). "
        "Closest: 'lm_head'. Nothing was changed. Fix: modules_to_save=['lm_head']"
    )
    assert text(target_modules=[]) == (
        "[PF001] target_modules=[] matches no linear module of LlamaForCausalLM (15 linear modules, "
        "for example 'model.layers.0.self_attn.q_proj'). Nothing was changed"
    )
    assert text(target_modules="q_proj") == (
        "[PF001] target_modules='q_proj' matches no linear module of LlamaForCausalLM (15 linear "
        "modules, for example 'model.layers.0.self_attn.q_proj'). Nothing was changed"
    )
    assert text(rank_pattern={"k_proj": 4}) == (
        "[PF001] rank_pattern: 'k_proj' matches none of the 4 target modules. Nothing was changed"
    )
    assert text(alpha_pattern={"q_prj": 4}) == (
        "[PF001] alpha_pattern: 'q_prj' matches none of the 4 target modules. Nothing was changed"
    )
    assert text(exclude_modules=["k_proj"]) == (
        "[PF001] exclude_modules: 'k_proj' excludes no target. Nothing was changed"
    )
    assert text(exclude_modules="nothing.*") == (
        "[PF001] exclude_modules: 'nothing.*' excludes no target. Nothing was changed"
    )
    assert text(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]) == (
        "[PF001] modules_to_save and target_modules both name 'lm_head'; keep it in one of them. "
        "Nothing was changed"
    )
    assert text(target_modules="(q_proj").startswith(
        "[PF001] '(q_proj' is not a regular expression: missing )"
    )
    assert "is not a regular expression" in text(target_modules="(" * 20000)
    for layers in (7, [7], [0, 7], range(1, 8, 6), [1, -1]):
        missing = -1 if layers == [1, -1] else 7
        assert text(layers_to_transform=layers) == (
            f"[PF001] layers_to_transform: there is no layer {missing}; the model has layers 0 to 1. "
            "Nothing was changed"
        )


def test_unknown_model_needs_targets():
    model = nn.Sequential(nn.Linear(3, 3))
    message = refused(model, TargetModuleError, lambda: pyfast.apply(model, LoraConfig()))
    assert message == (
        "[PF001] Sequential has no default targets; set target_modules, for example "
        "target_modules='all-linear'. Nothing was changed"
    )
    config = LoraConfig(target_modules=["a"], layers_to_transform=[0])
    named = nn.ModuleDict({"a": nn.Linear(3, 3)})
    message = refused(named, TargetModuleError, lambda: pyfast.apply(named, config))
    assert "there is no layer 0; the model has no numbered layers" in message
    alone = nn.Linear(3, 3)
    config = LoraConfig(target_modules="all-linear")
    message = refused(alone, TargetModuleError, lambda: pyfast.apply(alone, config))
    assert "0 linear modules" in message


def test_allow_unmatched():
    model = llama()
    config = LoraConfig(
        target_modules=["q_proj", "v_porj"],
        modules_to_save=["score"],
        rank_pattern={"x": 1},
        exclude_modules=["y"],
    )
    pyfast.apply(model, config, allow_unmatched=True)
    assert len(pyfast.adapter_parameters(model)) == 4


def test_other_kinds_of_modules():
    model = llama()
    for name, kind in (("1.input_layernorm", "LlamaRMSNorm"), ("self_attn", "LlamaAttention")):
        config = LoraConfig(target_modules=["q_proj", name])
        message = refused(
            model, UnsupportedError, lambda config=config: pyfast.apply(model, config)
        )
        assert f"'{name}' names" in message
        assert f"a {kind}; only linear layers (dense or 4-bit) can carry an adapter" in message


EVIL = r"(?P<z>.+?)*(.+?)*(.+?)*(.+?)*(?P=z)(?<!j)"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_catastrophic_patterns_stop_after_a_second(field):
    model = llama()
    value = {EVIL: 4} if field == "rank_pattern" else EVIL
    config = LoraConfig(**{"target_modules": "all-linear", field: value})
    start = time.thread_time()
    message = refused(model, UnsafeFileError, lambda: pyfast.apply(model, config))
    assert time.thread_time() - start < 2.5
    assert "takes more than 1 s to match; use a list of names. Nothing was changed" in message


CONFIGS = [
    (ConfigError, {"r": 0}, "rank r=0 must be an integer of at least 1"),
    (ConfigError, {"r": 2.0}, "rank r=2.0 must be an integer of at least 1"),
    (ConfigError, {"r": True}, "rank r=True must be an integer of at least 1"),
    (
        ConfigError,
        {"r": 10**12},
        "rank r=1000000000000 must be an integer of at least 1 and at most 65536",
    ),
    (ConfigError, {"rank_pattern": {"q_proj": -1}}, "rank q_proj=-1 must be"),
    (ConfigError, {"rank_pattern": {"q_proj": 65537}}, "rank q_proj=65537 must be"),
    (ConfigError, {"rank_pattern": None}, "rank_pattern=None must be a dict"),
    (ConfigError, {"alpha_pattern": 3}, "alpha_pattern=3 must be a dict"),
    (ConfigError, {"target_modules": 3}, "target_modules=3 must be a name or a list of names"),
    (ConfigError, {"target_modules": [3]}, "target_modules=[3] must be a name or a list of names"),
    (ConfigError, {"exclude_modules": 3}, "exclude_modules=3 must be a name or a list of names"),
    (ConfigError, {"modules_to_save": 3}, "modules_to_save=3 must be a name or a list of names"),
    (ConfigError, {"layers_to_transform": "1"}, "layers_to_transform='1' must be a layer index"),
    (
        ConfigError,
        {"layers_to_transform": [1.0]},
        "layers_to_transform=[1.0] must be a layer index",
    ),
    (ConfigError, {"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern=3 must be"),
    (TargetModuleError, {"modules_to_save": "abc"}, "modules_to_save: 'abc' matches no module"),
    (ConfigError, {"lora_alpha": 0}, "lora_alpha=0 must be a number other than 0 of at most 1e+09"),
    (ConfigError, {"lora_alpha": float("nan")}, "lora_alpha=nan must be"),
    (ConfigError, {"lora_alpha": 1e30}, "lora_alpha=1e+30 must be"),
    (ConfigError, {"lora_alpha": 10**400}, "must be a number other than 0"),
    (ConfigError, {"alpha_pattern": {"q_proj": "x"}}, "q_proj='x' must be"),
    (ConfigError, {"lora_dropout": 1.0}, "lora_dropout=1.0 must be in [0, 1)"),
    (ConfigError, {"lora_dropout": float("nan")}, "lora_dropout=nan must be in [0, 1)"),
    (ConfigError, {"lora_dropout": "x"}, "lora_dropout='x' must be in [0, 1)"),
    (UnsupportedError, {"bias": "all"}, "bias='all' is not served; use bias='none'"),
    (ConfigError, {"use_dora": 1}, "use_dora=1 must be True or False"),
    (ConfigError, {"use_rslora": "no"}, "use_rslora='no' must be True or False"),
    (ConfigError, {"fan_in_fan_out": None}, "fan_in_fan_out=None must be True or False"),
    (ConfigError, {"inference_mode": "no"}, "inference_mode='no' must be True or False"),
    (
        UnsupportedError,
        {"init_lora_weights": "orthogonal"},
        "init_lora_weights='orthogonal' is not",
    ),
    (UnsupportedError, {"init_lora_weights": "olora"}, "init_lora_weights='olora' is not served"),
]


@pytest.mark.parametrize(("error", "options", "text"), CONFIGS)
def test_values_out_of_range(error, options, text):
    model = llama()
    config = LoraConfig(**{"target_modules": ["q_proj"], **options})
    assert text in refused(model, error, lambda: pyfast.apply(model, config))


@pytest.mark.parametrize(
    "name",
    [None, 3, "", "/x", "..", "a/b", "a.b", "a\\b", "a\0", "\u00e9", "x" * 65, "CON ", "a b"],
)
def test_adapter_names(name):
    model = llama()
    message = refused(
        model,
        AdapterStateError,
        lambda: pyfast.apply(model, LoraConfig(), adapter_name=name),
    )
    assert message == f"[PF017] adapter name {name!r} must match [A-Za-z0-9_-]{{1,64}}"


def test_states():
    model = llama()
    for call in (pyfast.merge, pyfast.unmerge, lambda m: pyfast.set_adapter(m, "x")):
        refused(model, AdapterStateError, lambda call=call: call(model))
    randomise(pyfast.apply(model, LoraConfig()))
    message = refused(model, AdapterStateError, lambda: pyfast.apply(model, LoraConfig()))
    assert message == (
        "[PF017] the model already has an adapter 'default'; pass another adapter_name or "
        "delete_adapter first"
    )
    message = refused(model, AdapterStateError, lambda: pyfast.set_adapter(model, ["default", "x"]))
    assert message == "[PF017] no adapter 'x'; the model has ['default']"
    refused(model, AdapterStateError, lambda: pyfast.delete_adapter(model, "x"))
    refused(model, AdapterStateError, lambda: pyfast.merge(model, "x"))
    refused(model, AdapterStateError, lambda: pyfast.adapter_parameters(model, "x"))
    message = refused(model, AdapterStateError, lambda: pyfast.quantize(model))
    assert message == "[PF017] quantize the model before adapters are applied or loaded"
    pyfast.merge(model)
    for call in (
        lambda: pyfast.merge(model),
        lambda: pyfast.set_adapter(model, "default"),
        lambda: pyfast.delete_adapter(model, "default"),
        lambda: pyfast.apply(model, LoraConfig(), adapter_name="b"),
    ):
        message = refused(model, AdapterStateError, call)
    assert message == (
        "[PF017] apply: adapters ['default'] are merged into 'model.layers.0.self_attn.q_proj'; "
        "call pyfast.unmerge first"
    )
    pyfast.unmerge(model)
    for names in (None, 3, [None], {"default": 1}):
        message = refused(model, ConfigError, lambda n=names: pyfast.set_adapter(model, n))
        assert f"set_adapter: names={names!r} must be a name or a list of names" in message
    pyfast.set_adapter(model, [])
    message = refused(model, AdapterStateError, lambda: pyfast.merge(model))
    assert message == "[PF017] no active adapter to merge; apply or load one first"


def test_non_finite_merges():
    model = randomise(pyfast.apply(llama(), LoraConfig()))
    model.model.layers[1].self_attn.v_proj.lora_B["default"].weight.data[3, 2] = float("nan")
    message = refused(model, NonFiniteError, lambda: pyfast.merge(model))
    assert message == (
        "[PF004] adapter 'default' has 1 non-finite values in "
        "model.layers.1.self_attn.v_proj.lora_B.weight; merging would spread them to the base "
        "weights. The model is unchanged"
    )
    model = randomise(pyfast.apply(llama().half(), LoraConfig()))
    layer = model.model.layers[1].self_attn.v_proj
    layer.lora_A["default"].weight.data.fill_(300.0)
    layer.lora_B["default"].weight.data.fill_(300.0)
    message = refused(model, NonFiniteError, lambda: pyfast.merge(model))
    assert message == (
        "[PF004] merging ['default'] would leave 2048 non-finite values in a torch.float16 weight "
        "[32, 64]. The model is unchanged"
    )


def test_quantize_errors():
    model = llama()
    message = refused(
        model, TargetModuleError, lambda: pyfast.quantize(model, skip_modules=["q_porj"])
    )
    assert message == "[PF001] skip_modules: 'q_porj' matches no linear module"
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    message = refused(model, NonFiniteError, lambda: pyfast.quantize(model))
    assert message == (
        "[PF004] model.layers.1.mlp.up_proj.weight holds NaN or infinity. The model is unchanged"
    )
    empty = nn.Sequential(nn.Tanh())
    message = refused(empty, TargetModuleError, lambda: pyfast.quantize(empty))
    assert message == "[PF001] Sequential has no dense linear layer to quantise"
    quantised = pyfast.quantize(llama())
    refused(quantised, TargetModuleError, lambda: pyfast.quantize(quantised))
    model = llama()
    for blocksize in (48, None, "64", 64.0, True, 10**30):
        message = refused(
            model, ConfigError, lambda b=blocksize: pyfast.quantize(model, blocksize=b)
        )
        assert f"quantize: blocksize={blocksize!r} must be one of (32, 64, 128," in message
    message = refused(model, ConfigError, lambda: pyfast.quantize(model, skip_modules=3))
    assert "skip_modules=3 must be a name or a list of names" in message


def test_modules_to_save_errors():
    model = pyfast.apply(llama(), LoraConfig())
    config = LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"])
    message = refused(
        model, UnsupportedError, lambda: pyfast.apply(model, config, adapter_name="b")
    )
    assert "'model.layers.0.self_attn' carries adapters already" in message
    model = pyfast.quantize(llama())
    config = LoraConfig(target_modules=["up_proj"], modules_to_save=["q_proj"])
    message = refused(model, UnsupportedError, lambda: pyfast.apply(model, config))
    assert "holds quantised weights, which cannot be trained" in message


def test_sft_errors():
    model = pyfast.quantize(llama())
    message = refused(model, UnsupportedError, lambda: pyfast.apply(model, SFTConfig()))
    assert message == (
        "[PF016] SFT cannot train quantised weights (14 layers, first "
        "'model.layers.0.self_attn.q_proj'); load the model dense, or use LoraConfig"
    )
    model = pyfast.apply(llama(), LoraConfig())
    config = SFTConfig()
    message = refused(
        model, AdapterStateError, lambda: pyfast.apply(model, config, adapter_name="b")
    )
    assert "merge or delete them first" in message
    model = llama()
    config = SFTConfig(freeze_modules=["embed_tokns"])
    message = refused(model, TargetModuleError, lambda: pyfast.apply(model, config))
    assert "freeze_modules: 'embed_tokns' matches no module" in message


def test_unknown_configs():
    model = llama()
    message = refused(model, UnsupportedError, lambda: pyfast.apply(model, {"r": 8}))
    assert message == (
        "[PF016] dict (peft_type None) is not served; use one of ['BottleneckConfig', 'IA3Config', "
        "'LoraConfig', 'PromptEncoderConfig', 'SFTConfig']"
    )


def test_failed_merge_is_undone(monkeypatch):
    model = randomise(pyfast.apply(llama(), LoraConfig()))
    last = model.model.layers[1].self_attn.v_proj

    def fail(name):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(last, "delta", fail)
    refused_state = fingerprint(model)
    with pytest.raises(torch.OutOfMemoryError):
        pyfast.merge(model)
    assert fingerprint(model) == refused_state
