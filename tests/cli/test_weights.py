# SPDX-License-Identifier: Apache-2.0
"""`quantize`, `merge` and `convert` write what transformers, bitsandbytes and plain torch agree with."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pyfast
from pyfast.train.command import program
from tests.cli.conftest import SMALL, Run
from tests.integrations.checkpoints import assert_equal_files, dense_counts
from tests.models import gpt2, llama, logits


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Oracle: base and adapter files put together by hand in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = json.loads((adapter / "adapter_config.json").read_text())
    factor = scale["lora_alpha"] / scale["r"]
    for name in [key for key in tensors if ".lora_A." in key]:
        layer = model.get_submodule(name.removeprefix("base_model.model.").split(".lora_A")[0])
        update = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        layer.weight.data += factor * update
    return logits(model)


def test_merge_gives_a_model_that_transformers_loads(
    run: Run, base: Path, trained: Path, tmp_path: Path
) -> None:
    adapter = trained / "adapter"
    status, out, _ = run(
        "merge", "--adapter", adapter, "--output", tmp_path / "m", "--dtype", "fp32"
    )
    assert status == 0
    assert f"{program()} generate --model {tmp_path / 'm'}" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(
        logits(merged), adapted_logits(base, adapter).float(), rtol=1e-4, atol=1e-5
    )
    assert run("merge", "--adapter", adapter, "--output", tmp_path / "h")[0] == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "h")
    expected = merged.get_parameter("model.layers.0.mlp.up_proj.weight").bfloat16()
    assert torch.equal(half.get_parameter("model.layers.0.mlp.up_proj.weight"), expected)


def test_merge_into_nf4_rounded_weights(
    run: Run, base: Path, trained: Path, tmp_path: Path
) -> None:
    adapter = trained / "adapter"
    half = tmp_path / "bf16"  # as models are stored: rounding fp32 weights first moves some codes
    assert run("convert", "--source", base, "--output", half)[0] == 0
    assert run("quantize", "--model", half, "--output", tmp_path / "q")[0] == 0
    assert (
        run("convert", "--source", tmp_path / "q", "--output", tmp_path / "d", "--dtype", "fp32")[0]
        == 0
    )
    merge = ["merge", "--adapter", adapter, "--model", half, "--output", tmp_path / "m"]
    assert run(*merge, "--dtype", "fp32", "--nf4", "true")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = adapted_logits(tmp_path / "d", adapter).float()
    torch.testing.assert_close(logits(merged), expected, rtol=2e-2, atol=2e-2)
    unrounded = adapted_logits(base, adapter).float()
    assert (logits(merged) - unrounded).norm() > 3 * (logits(merged) - expected).norm()


@pytest.mark.filterwarnings("ignore:adapter .* was trained on a dense base:UserWarning")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_merge_into_nf4_reads_layer_by_layer(
    run: Run,
    base: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """No dense weight of an earlier layer is there, and the bytes are those of the dense model's way."""
    adapter = trained / "adapter"
    oracle = pyfast.quantize(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    pyfast.unload(pyfast.merge(pyfast.load_adapter(oracle, adapter), dtype=torch.float32))
    oracle.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]).save_pretrained(
        tmp_path / "o"
    )
    counts = dense_counts(monkeypatch)
    merge = ["merge", "--adapter", adapter, "--model", base, "--output", tmp_path / "m"]
    assert run(*merge, "--nf4", "true", "--dtype", dtype)[0] == 0
    assert counts == [1] * 14
    assert_equal_files(tmp_path / "m", tmp_path / "o")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_gives(
    run: Run, base: Path, trained: Path, tmp_path: Path, umask: int
) -> None:
    adapter = trained / "adapter"
    commands = {
        "m": ["merge", "--adapter", adapter],
        "q": ["quantize", "--model", base],
        "d": ["convert", "--source", base],
        "a": ["convert", "--source", adapter],
    }
    before = os.umask(umask)
    try:
        for name, command in commands.items():
            assert run(*command, "--output", tmp_path / name)[0] == 0
        (tmp_path / "ordinary").touch()
    finally:
        os.umask(before)
    expected = (tmp_path / "ordinary").stat().st_mode
    files = [file for name in commands for file in (tmp_path / name).iterdir()]
    assert len(files) > 8
    assert {file.stat().st_mode for file in files} == {expected}


def test_adapter_of_a_stored_4_bit_model(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    """It is merged into the stored values, by the command that the run ended with."""
    assert run("quantize", "--model", base, "--output", tmp_path / "q")[0] == 0
    arguments = ["--model", tmp_path / "q", "--data", data, "--output_dir", tmp_path / "out"]
    status, out, _ = run("finetune", "--method", "qlora", *arguments, "--run.steps", 2, *SMALL)
    assert status == 0
    merge = next(line for line in out.splitlines() if line.startswith("Merge it:"))
    generate = next(line for line in out.splitlines() if line.startswith("Ask it:"))
    for line in (generate, f"{merge} --dtype fp32", f"{merge}-nf4 --nf4 true --dtype fp32"):
        status, _, err = run(*shlex.split(line.partition("pyfast ")[2]))
        assert (status, err) == (0, "")
    dense = ["convert", "--source", tmp_path / "q", "--output", tmp_path / "d", "--dtype", "fp32"]
    assert run(*dense)[0] == 0
    expected = adapted_logits(tmp_path / "d", tmp_path / "out" / "adapter").float()
    for name in ("merged", "merged-nf4"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_weights_that_fp16_cannot_hold(
    run: Run, base: Path, trained: Path, tmp_path: Path, command: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 1] = 1e5
    model.save_pretrained(tmp_path / "large")
    for file in base.glob("tokenizer*"):
        (tmp_path / "large" / file.name).write_bytes(file.read_bytes())
    source = {
        "merge": ["--adapter", trained / "adapter", "--model", tmp_path / "large"],
        "convert": ["--source", tmp_path / "large"],
    }[command]
    status, _, err = run(command, *source, "--output", tmp_path / "m", "--dtype", "fp16")
    assert status == 2
    expected = "NonFiniteError [PF004] model.layers.1.mlp.up_proj.weight holds NaN or infinity in "
    assert err.startswith(expected)
    assert err.endswith("Fix: --dtype bf16.\n")
    assert not (tmp_path / "m").exists()
    assert run(command, *source, "--output", tmp_path / "m", "--dtype", "bf16")[0] == 0


def test_stored_4_bit_model_with_another_config(run: Run, base: Path, tmp_path: Path) -> None:
    assert run("quantize", "--model", base, "--output", tmp_path / "q")[0] == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    status, _, err = run("convert", "--source", tmp_path / "q", "--output", tmp_path / "d")
    assert status == 2
    assert err.startswith("ConfigError [PF018] cannot load the model")
    assert "size mismatch for model.embed_tokens.weight" in err
    assert err.count("\n") == 1


HOLDS = "' holds 9 weights more than its config.json asks for (first: model.layers.1.input"
LACKS = "' lacks 9 weights of LlamaForCausalLM (first: model.layers.2.input_layernorm.weight)."


@pytest.mark.parametrize(
    ("layers", "command", "message"),
    [
        (1, ["generate", "--prompt", "w1", "--model"], HOLDS),
        (1, ["convert", "--output", "new", "--source"], HOLDS),
        (3, ["convert", "--output", "new", "--source"], LACKS),
    ],
)
def test_stored_4_bit_model_with_another_number_of_layers(
    run: Run,
    base: Path,
    tmp_path: Path,
    monkeypatch: Any,
    layers: int,
    command: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    quantized = tmp_path / "q"
    assert run("quantize", "--model", base, "--output", quantized)[0] == 0
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    status, _, err = run(*command, quantized)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_stored_4_bit_model_with_constants_of_older_files(
    run: Run, base: Path, tmp_path: Path
) -> None:
    assert run("quantize", "--model", base, "--output", tmp_path / "q")[0] == 0
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    save_file({name: torch.ones(8) for name in names}, tmp_path / "q" / "more.safetensors")
    assert run("convert", "--source", tmp_path / "q", "--output", tmp_path / "d")[0] == 0


def test_forgotten_nf4_is_noted(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--model", base, "--data", data, "--output_dir", tmp_path, "--run.steps", 1]
    assert run("finetune", "--method", "qlora", *arguments, *SMALL)[0] == 0
    adapter = tmp_path / "adapter"
    note = (
        f"Note: adapter '{adapter}' was trained on an NF4 base (blocksize=64, nested=True), but this "
        "LlamaForCausalLM is dense. Fix: --nf4 true --blocksize 64 --nested true, on a dense base\n"
    )
    ask = ["generate", "--adapter", adapter, "--prompt", "w1", "--max_new_tokens", 1]
    assert run(*ask)[2] == note
    assert run(*ask, "--nf4", "true")[2] == ""
    other = note.replace("is dense", "has blocksize=128, nested=False")
    flags = ["--nf4", "true", "--blocksize", 128, "--nested", "false"]
    assert run(*ask, *flags)[2] == other
    merge = ["merge", "--adapter", adapter, "--output", tmp_path / "m"]
    assert other in run(*merge, *flags)[2]
    pyfast.save_adapter(pyfast.apply(llama(), pyfast.LoraConfig()), tmp_path / "dense")
    asked = ["generate", "--model", base, "--adapter", tmp_path / "dense", *ask[3:]]
    assert "on a dense base" not in run(*asked)[2]
    assert "on a dense base, but" in run(*asked, "--nf4", "true")[2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("nested", [True, False])
def test_quantized_model_loads_in_bitsandbytes_and_converts_back(
    run: Run, base: Path, tmp_path: Path, nested: bool, family: str
) -> None:
    source = base
    if family == "gpt2":
        source = tmp_path / "gpt2"
        gpt2(layers=1).save_pretrained(source)
        for file in base.glob("tokenizer*"):
            (source / file.name).write_bytes(file.read_bytes())
    quantized, dense = tmp_path / "q", tmp_path / "d"
    status, out, _ = run(
        "quantize", "--model", source, "--output", quantized, "--nested", str(nested).lower()
    )
    assert status == 0, out
    assert run("convert", "--source", quantized, "--output", dense, "--dtype", "bf16")[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained(quantized)
    assert any(type(module).__name__ == "Linear4bit" for module in theirs.modules())
    ours = AutoModelForCausalLM.from_pretrained(dense)
    assert getattr(ours.config, "quantization_config", None) is None
    from bitsandbytes.functional import dequantize_4bit

    compared = 0
    for name, module in theirs.named_modules():
        if type(module).__name__ == "Linear4bit":
            expected = dequantize_4bit(module.weight.data, module.weight.quant_state).to(
                torch.bfloat16
            )
            weight = ours.get_parameter(f"{name}.weight")
            assert torch.equal(
                weight if family == "llama" else weight.t(), expected.view_as(expected)
            )
            compared += 1
    assert compared == (14 if family == "llama" else 4)


def test_convert_opens_a_pickle_only_on_demand(run: Run, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    for source in (tmp_path / "old", tmp_path / "old" / "adapter_model.bin"):
        status, _, err = run("convert", "--source", source, "--output", tmp_path / "new")
        assert status == 2
        assert "UnsafeFileError [PF014]" in err
        assert "--trust_pickle true" in err
        assert not (tmp_path / "new").exists()
    old, new = tmp_path / "old", tmp_path / "new"
    assert run("convert", "--source", old, "--output", new, "--trust_pickle", "true")[0] == 0
    converted = load_file(new / "adapter_model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[key], tensors[key]) for key in tensors)
    assert (new / "adapter_config.json").read_bytes() == (old / "adapter_config.json").read_bytes()


def test_convert_runs_no_code_from_a_pickle(run: Run, tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": Exploit()}, tmp_path / "adapter_model.bin")
    arguments = [
        "convert",
        "--source",
        tmp_path,
        "--output",
        tmp_path / "new",
        "--trust_pickle",
        "true",
    ]
    status, _, err = run(*arguments)
    assert status == 2
    assert "UnsafeFileError" in err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()
