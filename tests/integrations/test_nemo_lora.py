# SPDX-License-Identifier: Apache-2.0
"""LoRA in NeMo's form against fused layers in NeMo's layout, written here; round trips; refusals."""

import dataclasses

import peft
import pytest
import torch

import pyfast
from pyfast.errors import UnsupportedError
from pyfast.integrations.adapter_file import write_adapter
from pyfast.integrations.nemo_lora import NemoLora, from_nemo, to_nemo
from tests.family_models import variant
from tests.models import llama, logits

pytestmark = [
    # PEFT looks for the base model's config.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

DIM, ALPHA = 4, 6
LAYER = "decoder.layers.{}."
QKV = "self_attention.linear_qkv.adapter."
# Family's variant to the paths of its linears inside a layer: query, key and value (one if fused), the output
# of attention, gate and up (one if fused or not gated), down.
LLAMA = (
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
FALCON = ("self_attention.query_key_value", "self_attention.dense", *NEOX[2:])
GPT = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
PATHS = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "codegemma": LLAMA,
    "gemma3": LLAMA,
    "nemotron": (*LLAMA[:4], *LLAMA[5:]),
    "starcoder2": (*LLAMA[:4], "mlp.c_fc", "mlp.c_proj"),
    "glm": (*LLAMA[:4], "mlp.gate_up_proj", "mlp.down_proj"),
    "gptj": (*(f"attn.{n}_proj" for n in ("q", "k", "v", "out")), "mlp.fc_in", "mlp.fc_out"),
    "gpt_neox": NEOX,
    "falcon-7b": FALCON,
    "falcon-40b": FALCON,
    "falcon-rw": FALCON,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_bigcode-mha": GPT,
}


def heads_of(name, config):
    """Queries' heads, those of keys, and the size of one."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    fused = dict.fromkeys(("falcon-rw", "gpt_neox", "gpt2", "gpt_bigcode-mha"), heads)
    groups = {"falcon-7b": 1, "falcon-40b": 2, "gpt_bigcode": 1, **fused}.get(name, groups)
    return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def unfused(name, rows, heads, groups, size):
    """What transformers takes out of a fused linear's outputs: rows of query, key and value, head by head."""
    at = torch.arange(rows)
    if name in ("gpt2", "gpt_bigcode", "falcon-7b"):
        return at.split([heads * size, groups * size, groups * size])
    runs = at.view(groups, heads // groups + 2, size)
    return runs[:, :-2].reshape(-1), runs[:, -2].reshape(-1), runs[:, -1].reshape(-1)


def fused_outputs(y, heads, groups, size):
    """NeMo's outputs of linear_qkv, group by group, as query, key and value, head by head."""
    q, k, v, start = [], [], [], 0
    for _ in range(groups):
        for kind, count in ((q, heads // groups), (k, 1), (v, 1)):
            for _ in range(count):
                kind.append(y[..., start : start + size])
                start += size
    assert start == y.shape[-1]
    return [torch.cat(each, -1) for each in (q, k, v)]


def layers(model):
    return next(m for n, m in model.named_modules() if n.rpartition(".")[2] in ("layers", "h"))


def width(module):
    """In and out features of a plain linear of any class."""
    rows = tuple(module.weight.shape)
    return rows if type(module).__name__ == "Conv1D" else rows[::-1]


def nemo_adapter(model, name, *, seed=0, dtype=torch.float64):
    """A random adapter of all linears of a model, release 2, one A for each fused linear."""
    generator = torch.Generator().manual_seed(seed)
    qkv, out, fc1, fc2 = grouped(PATHS[name])
    tensors = {}
    for index, layer in enumerate(layers(model)):
        places = {
            "self_attention.linear_qkv": qkv,
            "self_attention.linear_proj": out,
            "mlp.linear_fc1": fc1,
            "mlp.linear_fc2": fc2,
        }
        for place, paths in places.items():
            shapes = [width(layer.get_submodule(path)) for path in paths]
            rows = sum(shape[1] for shape in shapes)
            for side, shape in (("in", (DIM, shapes[0][0])), ("out", (rows, DIM))):
                key = f"{LAYER.format(index)}{place}.adapter.linear_{side}.weight"
                tensors[key] = torch.randn(shape, generator=generator, dtype=dtype) * 0.1
    return NemoLora(tensors, DIM, ALPHA)


def grouped(paths):
    """The paths by NeMo's linear."""
    fused = len(paths) == 4 or "gate" not in "".join(paths) or "gate_up" in "".join(paths)
    first = 1 if len(paths) == 4 else 3
    middle = paths[first + 1 : -1]
    assert len(middle) == (1 if fused else 2)
    return paths[:first], paths[first : first + 1], middle, paths[-1:]


def loaded(model, tensors, fields, directory):
    write_adapter(directory, tensors, fields, {}, "dense", {})
    return pyfast.load_adapter(model, directory)


@pytest.mark.parametrize("name", PATHS)
def test_fused_layers_compute_what_the_converted_adapter_computes(name, tmp_path):
    base = variant(name).double()
    adapter = nemo_adapter(base, name)
    tensors, fields = from_nemo(adapter, base.config)
    assert (fields["r"], fields["lora_alpha"]) == (DIM, ALPHA)
    model = loaded(variant(name).double(), tensors, fields, tmp_path / "a")
    heads, groups, size = heads_of(name, base.config)
    qkv, out, fc1, fc2 = grouped(PATHS[name])
    for index in range(2):
        frozen, adapted = layers(base)[index], layers(model)[index]

        def change(path, x, frozen=frozen, adapted=adapted):
            return adapted.get_submodule(path)(x) - frozen.get_submodule(path)(x)

        def nemo(place, x, index=index):
            key = f"{LAYER.format(index)}{place}.adapter.linear_"
            a, b = adapter.tensors[f"{key}in.weight"], adapter.tensors[f"{key}out.weight"]
            return (x @ a.T @ b.T) * ALPHA / DIM

        x = torch.randn(3, 5, width(frozen.get_submodule(qkv[0]))[0], dtype=torch.float64)
        expected = fused_outputs(nemo("self_attention.linear_qkv", x), heads, groups, size)
        got = [change(path, x) for path in qkv]
        if len(got) == 1:
            rows = unfused(name, got[0].shape[-1], heads, groups, size)
            got = [got[0][..., part] for part in rows]
        gate_up = nemo("mlp.linear_fc1", x)
        expected += gate_up.chunk(2, -1) if len(fc1) == 2 else [gate_up]
        got += [change(path, x) for path in fc1]
        for place, (path,) in (("self_attention.linear_proj", out), ("mlp.linear_fc2", fc2)):
            x = torch.randn(3, 5, width(frozen.get_submodule(path))[0], dtype=torch.float64)
            expected.append(nemo(place, x))
            got.append(change(path, x))
        for one, other in zip(got, expected, strict=True):
            assert other.norm() > 0.1
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_a_fused_llama_layer_with_its_weights(tmp_path):
    """linear_qkv as NeMo has it, frozen weight and adapter in one, in the place of q, k and v."""
    model = llama().double()
    adapter = nemo_adapter(model, "llama")
    tensors, fields = from_nemo(adapter, model.config)
    attention = model.model.layers[1].self_attn
    q, k, v = (getattr(attention, f"{n}_proj").weight.detach().view(-1, 16, 64) for n in "qkv")
    weight = torch.cat(
        [torch.cat([q[2 * g : 2 * g + 2], k[g : g + 1], v[g : g + 1]]) for g in (0, 1)]
    )
    key = LAYER.format(1) + QKV
    a, b = (adapter.tensors[f"{key}linear_{side}.weight"] for side in ("in", "out"))
    x = torch.randn(7, 64, dtype=torch.float64)
    mixed = x @ weight.reshape(-1, 64).T + ALPHA / DIM * (x @ a.T @ b.T)
    loaded(model, tensors, fields, tmp_path / "a")
    for letter, expected in zip("qkv", fused_outputs(mixed, 4, 2, 16), strict=True):
        got = getattr(attention, f"{letter}_proj")(x)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_peft_reads_what_was_converted(tmp_path):
    model = llama()
    tensors, fields = from_nemo(nemo_adapter(model, "llama", dtype=torch.float32), model.config)
    ours = loaded(model, tensors, fields, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", PATHS)
def test_from_nemo_and_back(name):
    model = variant(name)
    adapter = nemo_adapter(model, name)
    tensors, fields = from_nemo(adapter, model.config)
    back = to_nemo(tensors, fields, model.config)
    same(back.tensors, adapter.tensors)
    assert (back.dim, back.alpha) == (DIM, ALPHA)
    for kind in ("nemo", "canonical"):
        for release in (1, 2):
            other = to_nemo(tensors, fields, model.config, variant=kind, release=release)
            assert (release == 2) == all(".adapter." in key for key in other.tensors)
            again, values = from_nemo(other, model.config)
            same(again, tensors)
            assert values == fields


def peft_adapter(**options):
    """A PEFT adapter with A's of its own for each linear: tensors and fields."""
    options = {"r": DIM, "lora_alpha": ALPHA, "target_modules": "all-linear"} | options
    model = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {
        key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for key, tensor in state.items()
    }
    fields = model.peft_config["default"].to_dict() | {"peft_type": "LORA"}
    return tensors, fields, model.config


def test_names_of_both_releases():
    tensors, fields, config = peft_adapter()
    names = {
        (2, "nemo"): ["self_attention.linear_qkv.adapter", "mlp.linear_fc1.adapter"],
        (2, "canonical"): [
            *(f"self_attention.linear_qkv.adapter.adapter_{n}" for n in "qkv"),
            *(f"mlp.linear_fc1.adapter.adapter_{n}" for n in ("gate", "up")),
        ],
        (1, "nemo"): [
            "self_attention.adapter_layer.lora_kqv_adapter",
            "mlp.adapter_layer.lora_hto4h_adapter",
        ],
        (1, "canonical"): [
            *(f"self_attention.adapter_layer.lora_unfused_kqv_adapter.{n}_adapter" for n in "qkv"),
            *(f"mlp.adapter_layer.lora_unfused_hto4h_adapter.{n}_adapter" for n in ("gate", "up")),
        ],
    }
    others = {
        2: ["self_attention.linear_proj.adapter", "mlp.linear_fc2.adapter"],
        1: [
            "self_attention.adapter_layer.lora_dense_attention_adapter",
            "mlp.adapter_layer.lora_4htoh_adapter",
        ],
    }
    for (release, kind), fused in names.items():
        made = to_nemo(tensors, fields, config, variant=kind, release=release, stack=True)
        start = "" if release == 2 else "model."
        assert set(made.tensors) == {
            f"{start}decoder.layers.{i}.{name}.linear_{side}.weight"
            for i in range(2)
            for name in fused + others[release]
            for side in ("in", "out")
        }


def test_canonical_is_exact_for_any_adapter():
    tensors, fields, config = peft_adapter()
    made = to_nemo(tensors, fields, config, variant="canonical")
    assert (made.dim, made.alpha) == (DIM, ALPHA)
    same(from_nemo(made, config)[0], tensors)


@pytest.mark.parametrize(
    ("targets", "parts"),
    [("all-linear", 3), (["q_proj", "v_proj"], 2), (["up_proj", "down_proj"], 1)],
)
def test_different_as_are_stacked(targets, parts, tmp_path):
    tensors, fields, config = peft_adapter(target_modules=targets)
    made = to_nemo(tensors, fields, config, stack=True)
    assert (made.dim, made.alpha) == (parts * DIM, parts * ALPHA)
    assert made.alpha / made.dim == ALPHA / DIM
    assert all(made.dim in tensor.shape for tensor in made.tensors.values())
    separate, values = from_nemo(made, config)
    same(to_nemo(separate, values, config).tensors, made.tensors)
    write_adapter(tmp_path / "before", tensors, fields_of(fields), {}, "dense", {})
    before = pyfast.load_adapter(llama().double(), tmp_path / "before")
    after = loaded(llama().double(), separate, values, tmp_path / "after")
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-11, atol=1e-12)


def fields_of(fields):
    """A config's fields as JSON has them."""
    return {
        k: sorted(v) if isinstance(v, set) else v for k, v in fields.items() if v is not None
    } | {"task_type": "CAUSAL_LM"}


def test_canonical_parts_of_a_fused_base_are_stacked():
    model = variant("gpt_neox").double()
    adapter = nemo_adapter(model, "gpt_neox")
    tensors, fields = from_nemo(adapter, model.config)
    parts = to_nemo(tensors, fields, model.config, variant="canonical")
    changed = dict(parts.tensors)
    key = LAYER.format(0) + QKV + "adapter_k.linear_in.weight"
    changed[key] = changed[key] * 2
    parts = dataclasses.replace(parts, tensors=changed)
    with pytest.raises(UnsupportedError, match="query, key, value differ; stack them"):
        from_nemo(parts, model.config)
    stacked, values = from_nemo(parts, model.config, stack=True)
    assert (values["r"], values["lora_alpha"]) == (3 * DIM, 3 * ALPHA)
    path = "base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_"
    size, heads = 16, 4
    got = (stacked[f"{path}B.weight"] @ stacked[f"{path}A.weight"]).view(heads, 3, size, -1)
    before = (tensors[f"{path}B.weight"] @ tensors[f"{path}A.weight"]).view(heads, 3, size, -1)
    factor = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(got, before * factor, rtol=1e-12, atol=1e-12)
