# SPDX-License-Identifier: Apache-2.0
"""Which attention a packed run gets, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pyfast
from pyfast.errors import UnsupportedError
from pyfast.integrations import varlen_attention
from pyfast.integrations.varlen_attention import NAME
from pyfast.train import attention, finetune, packing
from pyfast.train.attention import attention_in_words, choose_attention
from pyfast.train.config import DatasetOptions
from pyfast.train.model import Place
from pyfast.train.packing import prepare_packing, row_capacity
from tests.family_models import variant
from tests.models import gpt2
from tests.packed import examples, looped

GPU = Place(torch.device("cuda"), torch.bfloat16, "")
FLASH, FLEX = "flash_attention_2", "flex_attention"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`installed(kernels, flash_attn)` says what there is."""

    def put(kernels: bool = True, flash_attn: bool = False) -> None:
        monkeypatch.setattr(varlen_attention, "has_kernels", lambda device: kernels)
        monkeypatch.setattr(attention, "_has_flash_attn", lambda: flash_attn)

    return put


@pytest.mark.parametrize(
    ("name", "changes", "with_flash", "with_varlen", "without"),
    [
        ("llama", {}, [FLASH, NAME, FLEX], [NAME, FLEX], [FLEX]),
        ("gpt_neox", {}, [FLASH, NAME, FLEX], [NAME, FLEX], [FLEX]),
        ("gpt2", {}, [FLASH, NAME], [NAME], []),  # no flex attention
        ("mistral", {}, [FLASH, NAME, FLEX], [NAME, FLEX], [FLEX]),
        ("gemma3", {}, [FLASH, NAME, FLEX], [NAME, FLEX], [FLEX]),
        ("gemma2", {}, [FLASH, FLEX], [FLEX], [FLEX]),
        ("llama", {"attention_dropout": 0.1}, [FLASH], [], []),
        ("gpt2", {"attn_pdrop": 0.1}, [FLASH], [], []),
        ("falcon-7b", {}, [], [], []),
        ("llama", {"attn_implementation": "eager"}, [], [], []),
    ],
)
def test_choice(
    installed: Any,
    name: str,
    changes: dict[str, Any],
    with_flash: list[str],
    with_varlen: list[str],
    without: list[str],
) -> None:
    model = variant(name, **changes)
    installed(flash_attn=True)
    assert choose_attention(model, GPU) == with_flash
    installed()
    assert choose_attention(model, GPU) == with_varlen
    installed(kernels=False)
    assert choose_attention(model, GPU) == without


@pytest.mark.parametrize(
    "place",
    [Place(GPU.device, torch.float32, ""), Place(torch.device("cpu"), torch.bfloat16, "")],
    ids=["float32", "cpu"],
)
def test_only_gpus_in_half_precision_have_another(installed: Any, place: Place) -> None:
    installed(flash_attn=True)
    assert not choose_attention(variant("llama"), place)


def test_configs_without_one_head_size_have_a_choice(installed: Any) -> None:
    installed()
    small = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**small))
    assert choose_attention(mamba, GPU) == []
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    several = transformers.Gemma4TextConfig(**small, **heads, vocab_size_per_layer_input=96)
    with torch.device("meta"):
        assert choose_attention(transformers.Gemma4ForCausalLM(several), GPU) == [NAME, FLEX]


def llava() -> Any:
    """A model in two parts, of which one reads text."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=96, num_hidden_layers=2, pad_token_id=0, **size)
    vision = transformers.CLIPVisionConfig(num_hidden_layers=1, image_size=16, patch_size=8, **size)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_choice_for_the_part_that_reads_text_is_kept(installed: Any) -> None:
    installed()
    model = llava()
    assert NAME in choose_attention(model, GPU)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    assert choose_attention(model, GPU) == []


@pytest.mark.parametrize("name", ["t5", "recurrent_gemma"])
def test_models_that_are_refused_keep_theirs(
    installed: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    installed()
    model = variant(name)
    with pytest.raises(UnsupportedError):
        prepare_packing(model, examples([9, 7]), GPU)
    assert model.config._attn_implementation == "sdpa"
    assert not capsys.readouterr().out


def test_rows() -> None:
    model = variant("llama")
    assert row_capacity(model, 17) == 17
    varlen_attention.register()
    for name in (NAME, "flash_attention_2"):
        model.config._attn_implementation = name
        assert row_capacity(model, 17) > 2**60


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is varlen attention, wherever a model is, and a loop stands for its kernels."""
    varlen_attention.register()
    monkeypatch.setattr(packing, "choose_attention", lambda model, place: [NAME])
    monkeypatch.setattr(varlen_attention, "has_kernels", lambda device: True)
    monkeypatch.setattr(varlen_attention, "_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(varlen_attention, "varlen_attn", looped)
    monkeypatch.setattr(varlen_attention, "_GROUPED", {"enable_gqa": True})


def on_cpu(dtype: torch.dtype = torch.float32) -> Place:
    return Place(torch.device("cpu"), dtype, "")


def test_the_choice_is_kept_where_it_computes_the_same(
    varlen: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = variant("llama")
    prepare_packing(model, examples([9, 7]), on_cpu())
    assert model.config._attn_implementation == NAME
    assert not capsys.readouterr().out


def leaking(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    """A kernel that knows nothing of records."""
    heads = (each.float().transpose(0, 1) for each in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1).to(query.dtype)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel image\nmore of it")


def forwards_only(query: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """A kernel that has no backward pass."""
    query = query.view_as(query)
    if query.requires_grad:
        query.register_hook(broken)
    return looped(query, *rest, **options)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (leaking, "computes packed records"),
        (broken, "no kernel image\n"),
        (forwards_only, "no kernel image\n"),
    ],
)
@pytest.mark.parametrize("cast", [False, True], ids=["bf16", "autocast"])
def test_the_former_attention_comes_back_where_the_choice_fails(
    varlen: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: Any,
    reason: str,
    cast: bool,
) -> None:
    """Full fine-tuning has float32 weights: its kernels run under autocast, in the trial too."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
    model = variant("llama") if cast else variant("llama").bfloat16()
    prepare_packing(model, examples([9, 7]), on_cpu(torch.bfloat16))
    assert model.config._attn_implementation == "sdpa"
    said = capsys.readouterr().out
    assert said.startswith(f"Packing: {NAME} does not serve LlamaForCausalLM: ")
    assert reason in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("virtual", [False, True])
def test_the_trial_leaves_nothing_behind(varlen: None, virtual: bool) -> None:
    model = variant("llama")
    if virtual:
        pyfast.apply(model, pyfast.PromptEncoderConfig(num_virtual_tokens=4))
    model.train()
    hooks = len(model.get_input_embeddings()._forward_hooks)
    prepare_packing(model, examples([9, 7]), on_cpu())
    assert model.config._attn_implementation == NAME
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    assert model.training


@pytest.mark.parametrize("size", [12, 264])
def test_the_choice_is_not_kept_where_its_kernels_do_not_run(
    varlen: None, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    model = variant("llama", head_dim=size)
    prepare_packing(model, examples([9, 7]), on_cpu())
    assert model.config._attn_implementation == "sdpa"
    assert "torch's varlen kernels do not take" in capsys.readouterr().out


def test_the_next_is_tried_where_one_does_not_serve(
    varlen: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "choose_attention", lambda model, place: [NAME, "eager"])
    model = variant("llama", head_dim=12)
    prepare_packing(model, examples([9, 7]), on_cpu())
    assert model.config._attn_implementation == "eager"
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_each_part_gets_its_own_attention_back(
    varlen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", broken)
    model = llava()
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    prepare_packing(model, examples([9, 7]), on_cpu())
    config = model.config
    parts = (config, config.text_config, config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


def test_models_that_leak_with_both_are_refused(varlen: None) -> None:
    model = gpt2()
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(UnsupportedError, match="computes packed records"):
        prepare_packing(model, examples([9, 7]), on_cpu())


@pytest.mark.parametrize("method", ["lora", "p-tuning", "sft"])
def test_run(
    varlen: None, make_config: Any, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """It evaluates with `generate` too, and names its attention in what it says and writes."""
    options = DatasetOptions(packing=True)
    asked = {"predict_with_generate": True, "max_predict_samples": 2, "max_new_tokens": 4}
    result = finetune(make_config(method=method, dataset=options, steps=2, **asked))
    assert json.loads((result.output_dir / "result.json").read_text())["attention"] == NAME
    assert "Packing: records are kept apart by torch's varlen attention" in capsys.readouterr().out
    written = [path for path in Path(result.weights).rglob("*") if path.is_file()]
    assert not any(NAME.encode() in path.read_bytes() for path in written)


def test_words_say_why_there_is_a_mask() -> None:
    words = "the mask of sdpa attention"
    assert attention_in_words(variant("llama"), on_cpu()) == words
    assert (
        attention_in_words(variant("falcon-7b"), GPU) == f"{words}, as no other serves this model"
    )
    dropping = variant("llama", attention_dropout=0.1)
    assert attention_in_words(dropping, GPU) == f"{words}, as there is attention dropout"
    chosen = variant("llama", attn_implementation="eager")
    assert attention_in_words(chosen, GPU) == "the mask of eager attention"


def test_run_without_varlen(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(make_config(dataset=DatasetOptions(packing=True), steps=1))
    assert (
        "Packing: records are kept apart by the mask of sdpa attention" in capsys.readouterr().out
    )
