# SPDX-License-Identifier: Apache-2.0
"""Which attention a packed run gets, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfast.errors import UnsupportedError
from pyfast.integrations import varlen_attention
from pyfast.integrations.varlen_attention import NAME
from pyfast.train import attention, finetune, packing
from pyfast.train.attention import choose_attention
from pyfast.train.config import DatasetOptions
from pyfast.train.model import Place
from pyfast.train.packing import prepare_packing, row_capacity
from tests.family_models import variant
from tests.models import gpt2
from tests.packed import examples

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
        ("llama", {}, FLASH, NAME, FLEX),
        ("gpt_neox", {}, FLASH, NAME, FLEX),
        ("gpt2", {}, FLASH, NAME, "sdpa"),  # no flex attention
        ("mistral", {}, FLASH, NAME, FLEX),
        ("gemma3", {}, FLASH, NAME, FLEX),
        ("gemma2", {}, FLASH, FLEX, FLEX),
        ("llama", {"head_dim": 12}, FLASH, FLEX, FLEX),
        ("llama", {"head_dim": 264}, FLASH, FLEX, FLEX),
        ("llama", {"attention_dropout": 0.1}, FLASH, "sdpa", "sdpa"),
        ("gpt2", {"attn_pdrop": 0.1}, FLASH, "sdpa", "sdpa"),
        ("falcon-7b", {}, "sdpa", "sdpa", "sdpa"),
        ("llama", {"attn_implementation": "eager"}, "eager", "eager", "eager"),
    ],
)
def test_choice(
    installed: Any,
    name: str,
    changes: dict[str, Any],
    with_flash: str,
    with_varlen: str,
    without: str,
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
    assert choose_attention(variant("llama"), place) == "sdpa"


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
    """The choice is varlen attention, wherever a model is."""
    varlen_attention.register()
    monkeypatch.setattr(packing, "choose_attention", lambda model, place: NAME)


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


@pytest.mark.parametrize(
    ("kernel", "reason"), [(leaking, "computes two packed records"), (broken, "no kernel image\n")]
)
@pytest.mark.parametrize("cast", [False, True], ids=["bf16", "autocast"])
def test_the_former_attention_comes_back_where_the_choice_fails(
    varlen: None,
    installed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: Any,
    reason: str,
    cast: bool,
) -> None:
    """Full fine-tuning has float32 weights: its kernels run under autocast, in the trial too."""
    installed()
    monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
    model = variant("llama") if cast else variant("llama").bfloat16()
    prepare_packing(model, examples([9, 7]), on_cpu(torch.bfloat16))
    assert model.config._attn_implementation == "sdpa"
    said = capsys.readouterr().out
    assert said.startswith(f"Packing: {NAME} does not serve LlamaForCausalLM, sdpa is kept: ")
    assert reason in said
    assert len(said.splitlines()) == 1


def test_models_that_leak_with_both_are_refused(varlen: None) -> None:
    model = gpt2()
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(UnsupportedError, match="computes two packed records"):
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


def test_run_without_varlen(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(make_config(dataset=DatasetOptions(packing=True), steps=1))
    assert (
        "Packing: records are kept apart by the mask of sdpa attention" in capsys.readouterr().out
    )
