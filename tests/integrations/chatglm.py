# SPDX-License-Identifier: Apache-2.0
"""Random ChatGLM checkpoints in the original layout, and the architecture as published."""

import json

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

SIZES = {
    "num_layers": 2,
    "padded_vocab_size": 640,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "seq_length": 64,
    "layernorm_epsilon": 1e-5,
}
PUBLISHED = {
    **SIZES,
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "use_cache": True,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
RUNS_CODE = 'raise SystemExit("code of a checkpoint was run")\n'


def original(directory, dtype=torch.float32, **changes):
    """Write a random checkpoint; its config and weights."""
    directory.mkdir(exist_ok=True)
    config = PUBLISHED | changes
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(dtype)

    size, inner, vocabulary = 64, 96, config["padded_vocab_size"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else 4
    tensors = {
        "embedding.word_embeddings.weight": random(vocabulary, size) * 8,
        "rotary_pos_emb.inv_freq": torch.ones(4),
        "encoder.final_layernorm.weight": 1 + random(size),
        "output_layer.weight": random(vocabulary, size),
    }
    for index in range(2):
        layer = f"encoder.layers.{index}"
        tensors |= {
            f"{layer}.input_layernorm.weight": 1 + random(size),
            f"{layer}.self_attention.query_key_value.weight": random(64 + 32 * groups, size),
            f"{layer}.self_attention.dense.weight": random(size, 64),
            f"{layer}.post_attention_layernorm.weight": 1 + random(size),
            f"{layer}.mlp.dense_h_to_4h.weight": random(2 * inner, size),
            f"{layer}.mlp.dense_4h_to_h.weight": random(size, inner),
        }
        if config["add_qkv_bias"]:
            tensors[f"{layer}.self_attention.query_key_value.bias"] = random(64 + 32 * groups)
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    for file in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (directory / file).write_text(RUNS_CODE)
    return config, tensors


def ids(rows=2, columns=24):
    return torch.randint(3, 640, (rows, columns), generator=torch.Generator().manual_seed(1))


# --- the architecture as published, in float64 ---------------------------------------------------


def normed(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotated(x, config):
    """The first half of each head's channels, in neighbouring pairs; x is [batch, length, heads, 16]."""
    ratio = config.get("rope_ratio", 1)
    of_positions = "chatglm2" in config.get("_name_or_path", "")
    base = 10000 * (1 if of_positions else ratio)
    theta = (1.0 / (base ** (torch.arange(0, 8, 2, dtype=torch.float) / 8))).double()
    angle = torch.outer(torch.arange(x.shape[1]).double() / (ratio if of_positions else 1), theta)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    pairs, rest = x[..., :8].unflatten(-1, (4, 2)), x[..., 8:]
    turned = (
        pairs[..., 0] * cos - pairs[..., 1] * sin,
        pairs[..., 1] * cos + pairs[..., 0] * sin,
    )
    return torch.cat([torch.stack(turned, -1).flatten(-2), rest], -1)


def attention(x, weight, bias, dense, config):
    mixed = x @ weight.T + bias
    batch, length, _ = mixed.shape
    if config["multi_query_attention"]:
        groups = config["multi_query_group_num"]
        query, key, value = (
            part.view(batch, length, -1, 16)
            for part in mixed.split([64, 16 * groups, 16 * groups], -1)
        )
    else:
        query, key, value = mixed.view(batch, length, 4, 48).chunk(3, -1)
    query, key = rotated(query, config), rotated(key, config)
    repeats = 4 // key.shape[2]
    key = key[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)
    value = value[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2) @ dense.T


def reference(tensors, config, tokens):
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}
    x = w["embedding.word_embeddings.weight"][tokens]
    for index in range(2):
        layer = f"encoder.layers.{index}"
        fused = f"{layer}.self_attention.query_key_value"
        x = x + attention(
            normed(x, w[f"{layer}.input_layernorm.weight"]),
            w[f"{fused}.weight"],
            w.get(f"{fused}.bias", torch.zeros(())),
            w[f"{layer}.self_attention.dense.weight"],
            config,
        )
        inner = normed(x, w[f"{layer}.post_attention_layernorm.weight"])
        gate, up = (inner @ w[f"{layer}.mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * up) @ w[f"{layer}.mlp.dense_4h_to_h.weight"].T
    return normed(x, w["encoder.final_layernorm.weight"]) @ w["output_layer.weight"].T
