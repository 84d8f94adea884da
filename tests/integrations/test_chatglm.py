# SPDX-License-Identifier: Apache-2.0
"""ChatGLM 2 and 3 in their original layout, against the architecture as published."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GlmForCausalLM
from transformers.models.glm import modeling_glm

import pyfast
from pyfast.errors import ConfigError, UnsafeFileError, UnsupportedError
from pyfast.integrations import chatglm_model
from pyfast.nn import NF4Linear
from tests.integrations.chatglm import PUBLISHED, SIZES, ids, normed, original, reference
from tests.models import logits

VARIANTS = {
    "two groups": {},
    "full heads": {"multi_query_attention": False},
    "one group": {"multi_query_group_num": 1},
    "a group a head": {"multi_query_group_num": 4},
    "no bias": {"add_qkv_bias": False},
    "ChatGLM2-32k": {"rope_ratio": 4, "_name_or_path": "THUDM/chatglm2-6b-32k"},
    "ChatGLM3-32k": {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k"},
    "full heads, told base": {
        "multi_query_attention": False,
        "rope_ratio": 50,
        "rope_ratio_of": "base",
    },
}


@pytest.fixture
def double(monkeypatch):
    """Let GLM's norms and rotations, which it rounds to float32, run in float64."""

    def norm(self, x):
        return normed(x, self.weight)

    def rotation(self, x, position_ids):
        angle = position_ids[..., None].double() * self.inv_freq.double()
        return angle.repeat(1, 1, 2).cos(), angle.repeat(1, 1, 2).sin()

    monkeypatch.setattr(modeling_glm.GlmRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_glm.GlmRotaryEmbedding, "forward", rotation)


# --- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_published_architecture(name, tmp_path, double):
    config, tensors = original(tmp_path, **VARIANTS[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    expected = reference(tensors, config, ids())
    torch.testing.assert_close(logits(model, ids()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["two groups", "full heads", "ChatGLM2-32k"])
def test_as_loaded_in_float32_nothing_replaced(name, tmp_path):
    config, tensors = original(tmp_path, **VARIANTS[name])
    expected = reference(tensors, config, ids()).float()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(model, ids()), expected, rtol=1e-4, atol=1e-4)


def test_a_loaded_model_is_a_plain_glm(tmp_path):
    original(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is GlmForCausalLM
    assert type(model.config) is transformers.GlmConfig
    assert model.model.layers[0].self_attn.config is model.config
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(trusted, ids()), logits(model, ids()))
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(built) is GlmForCausalLM
    assert built.state_dict().keys() == model.state_dict().keys()


def test_saved_it_is_a_glm_that_transformers_alone_loads(tmp_path):
    original(tmp_path / "a", multi_query_attention=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert not saved.keys() & (PUBLISHED.keys() - {"model_type", "architectures"} - saved_names())
    torch.save(logits(model, ids()), tmp_path / "logits.pt")
    code = (
        "import sys, torch, transformers; d = sys.argv[1]\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(d + '/b')\n"
        "assert 'pyfast' not in sys.modules\n"
        "x = torch.randint(3, 640, (2, 24), generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad(): assert torch.equal(m(input_ids=x).logits, torch.load(d + '/logits.pt'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def saved_names():
    """Keys that GLM's own config has under the same name."""
    return vars(transformers.GlmConfig()).keys() | {"model_type", "architectures", "dtype"}


@pytest.mark.parametrize("first", ["pyfast", "transformers"])
def test_found_in_whichever_order_the_libraries_are_imported(first, tmp_path):
    original(tmp_path)
    second = {"pyfast": "transformers", "transformers": "pyfast"}[first]
    code = (
        f"import sys, {first}, {second}\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "print(type(A.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.stdout.split() == [b"GlmForCausalLM"], done.stderr


def test_shards_and_a_name_on_the_hub(tmp_path, monkeypatch):
    _, tensors = original(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        part = {name: tensors[name] for name in tensors if names[name] == shard}
        save_file(part, tmp_path / shard, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, ids()), logits(whole, ids()))

    monkeypatch.setattr(chatglm_model, "snapshot_download", lambda *_, **__: str(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    named = chatglm_model.ChatGLMForCausalLM.from_pretrained("thudm/some", config=config)
    assert (named.name_or_path, named.config.name_or_path) == ("thudm/some", "thudm/some")
    assert torch.equal(logits(named, ids()), logits(whole, ids()))
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UnsafeFileError, match="outside its directory"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": names | {"a": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match=r"lacks 1 of its files \(first: gone"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- refused, before a weight is read ------------------------------------------------------------

OPTIONS = {
    "rmsnorm": False,
    "original_rope": False,
    "post_layer_norm": False,
    "apply_residual_connection_post_layernorm": True,
    "add_bias_linear": True,
    "fp32_residual_connection": True,
    "hidden_dropout": 0.1,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "gptq"},
    "pre_seq_len": 128,
    "quantization_bit": 4,
}


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(GlmForCausalLM, "__init__", load)


@pytest.mark.parametrize(("key", "value"), OPTIONS.items())
def test_options_without_a_counterpart_are_refused(key, value, tmp_path, no_loading):
    original(tmp_path, **{key: value})
    with pytest.raises(UnsupportedError, match=re.escape(f"{key}={value!r}")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "2"}, "num_layers is '2'"),
        ({"multi_query_group_num": 3}, "must divide the 4 attention heads"),
        ({"rope_ratio": -1}, "rope_ratio is -1"),
        ({"rope_ratio": 4}, '"rope_ratio_of": "base" or "positions"'),
        ({"num_layers": 3}, r"lacks 7 weights .*encoder\.layers\.2"),
        ({"num_layers": 1}, r"holds 7 weights .*encoder\.layers\.1"),
        ({"ffn_hidden_size": 128}, r"4 weights .*dense_4h_to_h.*\[64, 96\] for \[64, 128\]"),
        ({"add_qkv_bias": False}, "holds 2 weights"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message, tmp_path, no_loading):
    original(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", SIZES)
def test_a_missing_key_is_named(key, tmp_path, no_loading):
    original(tmp_path)
    rest = {name: value for name, value in PUBLISHED.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(rest))
    with pytest.raises(ConfigError, match=f"lacks {key},"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pickles_damaged_and_quantised_files_are_refused(tmp_path, no_loading):
    _, tensors = original(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "transformer.output_layer.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"output_layer\.weight is stored as I8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match=r"pickles \(pytorch_model\.bin\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- methods -------------------------------------------------------------------------------------


def trained(model, **options):
    """Two steps of LoRA; the model."""
    torch.manual_seed(0)
    pyfast.apply(model, pyfast.LoraConfig(r=4, **options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_lora_trains_saves_and_merges(tmp_path):
    config, tensors = original(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    adapted = logits(model, ids())
    pyfast.save_adapter(model, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(peft, ids()), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - reference(tensors, config, ids())).abs().max() > 1e-2
    pyfast.merge(model)
    pyfast.unload(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids()), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_qlora_has_the_bytes_of_quantize_and_trains(full, tmp_path):
    original(tmp_path / "base", multi_query_attention=not full)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=pyfast.NF4Config()
    )
    expected = pyfast.quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    found, wanted = quantized.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert isinstance(quantized.model.layers[0].self_attn.q_proj, NF4Linear)
    assert isinstance(quantized, GlmForCausalLM)
    quantized.save_pretrained(tmp_path / "nf4")
    reread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "nf4", config=pyfast.NF4Config.model_config(tmp_path / "nf4")
    )
    assert torch.equal(logits(reread, ids()), logits(quantized, ids()))
    before = logits(quantized, ids())
    assert not torch.equal(logits(trained(quantized), ids()), before)
    quantized.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_parts_of_the_fused_matrix_may_stay_dense(tmp_path):
    _, tensors = original(tmp_path)
    options = pyfast.NF4Config(skip_modules=["k_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    layer = model.model.layers[1].self_attn
    assert isinstance(layer.q_proj, NF4Linear)
    assert isinstance(layer.v_proj, NF4Linear)
    fused = tensors["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    assert torch.equal(layer.k_proj.weight, fused[64:96])
