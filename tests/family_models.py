# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every family and every variant of its layout, by name.

A new family's variants are lines in `VARIANTS`; the tests of tests/families and tests/matrix pick them up.
Where its modules are not called as Llama's, it has a line in tests/matrix/places.py too.
"""

from __future__ import annotations

import torch
import transformers

from tests.models import VOCAB, plain, token_ids

_SIZES = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_TIED = {"tie_word_embeddings": True}
_MQA = {"num_key_value_heads": 1}
_GEMMA = _LLAMA | _TIED | {"head_dim": 16}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_FALCON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_GRIFFIN = _GEMMA | _MQA | {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 64}

VARIANTS: dict[str, dict[str, object]] = {
    "gpt2": {"model_type": "gpt2", **_GPT, **_NO_DROPOUT},
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA},
    "gpt_neox-sequential": {"model_type": "gpt_neox", **_LLAMA, "use_parallel_residual": False},
    "gptj": {"model_type": "gptj", **_GPT, **_NO_DROPOUT, "rotary_dim": 8},
    "nemotron": {"model_type": "nemotron", **_LLAMA},
    "llama": {"model_type": "llama", **_LLAMA},
    "llama-mha-tied": {"model_type": "llama", **_LLAMA, **_TIED, "num_key_value_heads": 4},
    "glm": {"model_type": "glm", **_LLAMA, "head_dim": 16, "attention_bias": True},
    "glm-mha": {"model_type": "glm", **_LLAMA, "head_dim": 16, "num_key_value_heads": 4},
    "falcon-7b": {"model_type": "falcon", **_FALCON},
    "falcon-40b": {
        "model_type": "falcon",
        **_FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon-11b": {
        "model_type": "falcon",
        **_FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "falcon-rw": {
        "model_type": "falcon",
        **_FALCON,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "alibi": True,
    },
    "gpt_bigcode": {"model_type": "gpt_bigcode", **_GPT, **_NO_DROPOUT},
    "gpt_bigcode-mha": {"model_type": "gpt_bigcode", **_GPT, **_NO_DROPOUT, "multi_query": False},
    "starcoder2": {"model_type": "starcoder2", **_LLAMA, **_TIED},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 8},
    "mixtral": {
        "model_type": "mixtral",
        **_LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma": {"model_type": "gemma", **_GEMMA, "num_key_value_heads": 4},
    "codegemma": {"model_type": "gemma", **_GEMMA, **_MQA, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **_GEMMA, "sliding_window": 8},
    "recurrent_gemma": {"model_type": "recurrent_gemma", **_GRIFFIN},
    "t5": {"model_type": "t5", **_T5},
    "t5-gated": {
        "model_type": "t5",
        **_T5,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_LLAMA, **_TIED, "head_dim": 16},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "sliding_window": 8},
    "glm4": {"model_type": "glm4", **_LLAMA, "head_dim": 16},
    "phi3": {"model_type": "phi3", **_LLAMA},
    "phi3-mha": {"model_type": "phi3", **_LLAMA, "num_key_value_heads": 4, "sliding_window": 8},
    "olmo2": {"model_type": "olmo2", **_LLAMA},
    "olmo2-mha": {"model_type": "olmo2", **_LLAMA, "num_key_value_heads": 4},
    "olmo2-biases-tied": {"model_type": "olmo2", **_LLAMA, **_TIED, "attention_bias": True},
}
"""Name to the values of its transformers config."""


def variant(name, *, seed=0, **changes):
    """The model of a variant, without dropout; `changes` go to its config."""
    torch.manual_seed(seed)
    values = _SIZES | VARIANTS[name] | changes
    config = transformers.AutoConfig.for_model(**values)
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_config(config).eval()
    if not getattr(config, "scale_decoder_outputs", True):  # T5 1.1, which transformers would tie
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.125)
    if hasattr(model.config, "num_local_experts"):  # grouped products do not serve float64
        model.set_experts_implementation("eager")
    for module in model.modules():  # biases are zero and norms flat in a new model
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.nn.Parameter):
            torch.nn.init.normal_(bias, std=0.02)
    return model


def batch(model, *, seed=0):
    """Inputs and labels for a model of any variant, where the model is."""
    ids = token_ids(seed=seed)
    labels = token_ids(columns=6, seed=seed + 1) if model.config.is_encoder_decoder else ids
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def outputs(model):
    """Logits for `batch`, without gradients."""
    with torch.no_grad():
        return model(**batch(model)).logits


def gradients(model, name_of=str):
    """Name to gradient, of all parameters that got one."""
    model(**batch(model)).loss.backward()
    return {name_of(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_trains_like_peft(ours, theirs):
    """The same parameters, shapes, state and, in float64, outputs and gradients."""
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    other = {plain(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in other.items()}
    assert {plain(n) for n in theirs.state_dict()} == set(ours.state_dict())
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-9, atol=1e-9)
    got, wanted = gradients(ours), gradients(theirs, plain)
    assert got.keys() == wanted.keys() == mine.keys()
    for path, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[path], rtol=1e-9, atol=1e-9)
