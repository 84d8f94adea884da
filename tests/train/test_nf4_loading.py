# SPDX-License-Identifier: Apache-2.0
"""`--method qlora` and `pyfast quantize` make layers NF4 as they are read, with the
bytes of `pyfast.quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pyfast
from pyfast.cli import main
from pyfast.errors import NonFiniteError
from pyfast.train.config import QuantOptions
from pyfast.train.model import choose_place, prepare_model
from tests.integrations.checkpoints import assert_equal_files, assert_equal_tensors, dense_counts

QUANT = [{}, {"nested": False}, {"blocksize": 32}]


def quantised(directory: Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The oracle: the dense model first."""
    return pyfast.quantize(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), **options)


@pytest.mark.parametrize("options", QUANT, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_qlora(
    make_config: Any,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    options: dict[str, Any],
) -> None:
    counts = dense_counts(monkeypatch)
    config = make_config(method="qlora", quant=QuantOptions(**options), dtype=dtype)
    place = choose_place(config.run)
    model, _ = prepare_model(config, place)
    assert counts == [1] * 14
    assert getattr(model.config, "quantization_config", None) is None
    state = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    assert_equal_tensors(state, quantised(tiny_model, place.dtype, options).state_dict())


@pytest.mark.parametrize("options", QUANT, ids=str)
def test_quantize(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = dense_counts(monkeypatch)
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    flags = [word.lower() for word in flags]
    output = tmp_path / "ours"
    assert main(["quantize", "--model", str(tiny_model), "--output", str(output), *flags]) == 0
    assert counts == [1] * 14
    model = quantised(tiny_model, torch.bfloat16, options)
    model.save_pretrained(tmp_path / "theirs")
    assert_equal_files(output, tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")
    )
    assert ours == theirs
    dense = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in dense.parameters())
    assert f"{size / 1e6:,.1f} MB in bf16" in capsys.readouterr().out


def test_a_weight_that_is_not_finite(make_config: Any, tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    for file in tiny_model.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = make_config(method="qlora", model=str(tmp_path))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        prepare_model(config, choose_place(config.run))
