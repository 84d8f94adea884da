# SPDX-License-Identifier: Apache-2.0
"""P-tuning: PEFT's and NeMo's networks, positions, labels, generation, packing, checkpointing, refusals."""

import copy
import inspect

import peft
import pytest
import torch
from peft import get_peft_model

import pyfast
from pyfast import LoraConfig, PromptEncoderConfig
from pyfast.errors import ConfigError, UnsupportedError
from pyfast.nn.prompt import PromptEncoder, VirtualTokens
from tests.family_models import VARIANTS, batch, outputs, variant
from tests.models import fingerprint, gpt2, llama, logits, token_ids

pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported:UserWarning",
    "ignore:Could not find a config file:UserWarning",
)
V = 5


def config(**options):
    return PromptEncoderConfig(num_virtual_tokens=V, **options)


def prompted(model, **options):
    """With an encoder that training has moved."""
    torch.manual_seed(4)
    pyfast.apply(model, config(**options))
    for parameter in model.prompt_encoder.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def pefts(ours, base, **options):
    """PEFT's model with our encoder."""
    two = ours.config.is_encoder_decoder
    kind = "SEQ_2_SEQ_LM" if two else "CAUSAL_LM"
    if two:
        options["num_transformer_submodules"] = 1
    theirs = get_peft_model(
        base, peft.PromptEncoderConfig(num_virtual_tokens=V, task_type=kind, **options)
    )
    theirs.prompt_encoder.load_state_dict(
        {k.removeprefix("prompt_encoder."): v for k, v in ours.state_dict().items()
         if k.startswith("prompt_encoder.")}
    )  # fmt: skip
    return theirs.eval()


def cache_name(model):
    """What this version of transformers calls the cache."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def own(theirs):
    """PEFT's logits for the tokens that were given."""
    return theirs if isinstance(theirs, torch.Tensor) else theirs.logits[:, V:]


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_pefts_in_every_family(name):
    ours = prompted(variant(name))
    theirs = pefts(ours, variant(name))
    inputs = batch(ours)
    mine, two = ours(**inputs), ours.config.is_encoder_decoder
    if not two:  # PEFT learns the first token too
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][:, 0] = -100
    other = theirs(**inputs)
    torch.testing.assert_close(mine.loss, other.loss)
    torch.testing.assert_close(mine.logits, other.logits if two else own(other))
    assert mine.logits.shape[1] == inputs["labels"].shape[1]
    mine.loss.backward()
    other.loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "recurrent_gemma", "t5"])
def test_pefts_config_object_and_the_lstm(name):
    model = variant(name)
    two = model.config.is_encoder_decoder
    options = {
        "num_virtual_tokens": V,
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 24,
        "task_type": "SEQ_2_SEQ_LM" if two else "CAUSAL_LM",
    }
    theirs = get_peft_model(variant(name), peft.PromptEncoderConfig(**options)).eval()
    ours = pyfast.apply(model, peft.PromptEncoderConfig(**options))
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    other = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in other.items()}
    for key, parameter in mine.items():
        parameter.data.copy_(other[key])
    expected = theirs(**batch(model))
    torch.testing.assert_close(outputs(ours), expected.logits if two else own(expected))


def test_nemos_network():
    torch.manual_seed(0)
    encoder = PromptEncoder("NEMO", 400, 64, 48, 2, 0.0, torch.device("cpu")).double()
    state = {k: v.numpy() for k, v in encoder.state_dict().items()}
    first = state["embedding.weight"] @ state["mlp_head.0.weight"].T
    gelu = first * 0.5 * (1 + torch.erf(torch.from_numpy(first) / 2**0.5).numpy())
    expected = gelu @ state["mlp_head.2.weight"].T
    torch.testing.assert_close(encoder(), torch.from_numpy(expected))
    assert state["embedding.weight"].std() == pytest.approx(1, rel=0.05)
    assert state["mlp_head.0.weight"].std() == pytest.approx(0.023, rel=0.05)
    assert not state["mlp_head.0.bias"].any()
    model = pyfast.apply(llama(), config(encoder_reparameterization_type="NEMO"))
    assert model.prompt_encoder.default.embedding.weight.shape == (V, 1024)
    assert model(input_ids=token_ids(), labels=token_ids()).loss.requires_grad


def test_gradient_checkpointing_and_nf4():
    model = prompted(pyfast.quantize(llama()))
    ids = token_ids()
    grads = []
    new = getattr(model, "activation_checkpointing_enable", None)  # transformers >= 5.24
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        if options is not None:
            (new or model.gradient_checkpointing_enable)(options)
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for again in grads[1:]:
        for one, other in zip(grads[0], again, strict=True):
            torch.testing.assert_close(one, other)


def test_switched_combined_disabled_and_taken_off():
    model = prompted(gpt2())
    base, first = logits(gpt2()), logits(model)
    assert not torch.allclose(base, first)
    pyfast.apply(model, config(), adapter_name="b")
    second = logits(model)
    pyfast.set_adapter(model, ["default", "b"])
    prompt = torch.cat([model.prompt_encoder.embeddings(name) for name in ("default", "b")])
    with torch.no_grad(), pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), base)
        embeds = torch.cat([prompt.expand(2, -1, -1), model.transformer.wte(token_ids())], dim=1)
        expected = model(inputs_embeds=embeds).logits[:, 2 * V :]
    torch.testing.assert_close(logits(model), expected)
    copied = copy.deepcopy(model)
    pyfast.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    pyfast.apply(model, LoraConfig(init_lora_weights=False), adapter_name="lora")
    pyfast.set_adapter(model, ["default", "lora"])
    both = logits(model)
    with pytest.raises(UnsupportedError, match=r"'default' at .* consists of virtual tokens"):
        pyfast.merge(model, ["lora", "default"])
    pyfast.merge(model, "lora")
    pyfast.unmerge(model)
    pyfast.set_adapter(model, ["default", "lora"])
    assert torch.equal(logits(model), both)
    for name in ("lora", "default"):
        pyfast.delete_adapter(model, name)
    pyfast.set_adapter(model, "b")
    assert torch.equal(logits(model), second)
    pyfast.delete_adapter(model, "b")
    assert not any(isinstance(module, VirtualTokens) for module in model.modules())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(copied), expected)
    t5 = prompted(variant("t5"))
    assert torch.equal(outputs(pyfast.unload(t5)), outputs(variant("t5")))
    assert not t5.encoder._forward_pre_hooks


def test_compiled_model():
    model = prompted(llama())
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model)), expected)


def test_half_precision_keeps_the_encoder_in_float32():
    model = prompted(llama().to(torch.bfloat16))
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
    theirs = pefts(model, llama().to(torch.bfloat16))
    with torch.no_grad():
        assert torch.equal(logits(model), theirs(input_ids=token_ids()).logits[:, V:])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        ({"encoder_reparameterization_type": "mlp"}, "must be one of"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size=-1"),
        ({"encoder_dropout": 1.0}, "encoder_dropout=1.0"),
        ({"encoder_num_layers": 3}, "are the LSTM's"),
        ({"token_dim": 32}, "hidden size is 64"),
    ],
)
def test_values_out_of_range(options, text):
    model = llama()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=text):
        pyfast.apply(model, PromptEncoderConfig(**options))
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_apply_that_fails_half_way(name, monkeypatch, tmp_path):
    def failing(*_):
        raise torch.OutOfMemoryError

    model = variant(name)
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(VirtualTokens, "add", failing)
        with pytest.raises(torch.OutOfMemoryError):
            pyfast.apply(model, config())
    pyfast.save_adapter(prompted(variant(name)), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(VirtualTokens, "fill", failing)
        with pytest.raises(torch.OutOfMemoryError):
            pyfast.load_adapter(model, tmp_path)
    assert fingerprint(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
