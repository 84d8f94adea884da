# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pyfast.cli import main
from pyfast.train.run import resume_command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose sizes NF4 blocks divide, with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("base")
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(62))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=64, eos_token_id=1, bos_token_id=None, pad_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [{"input": f"w{i} w{i + 1}", "output": f"w{(7 * i) % 60} w{i + 2}"} for i in range(30)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


SMALL = ["--run.batch_size", 4, "--run.device", "cpu", "--run.dtype", "fp32", "--adapter.r", 4]


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished LoRA run."""
    output = tmp_path_factory.mktemp("runs") / "lora run"
    arguments = [
        "finetune",
        "--model",
        base,
        "--data",
        data,
        "--output_dir",
        output,
        "--run.steps",
        8,
        *SMALL,
    ]
    assert main([str(a) for a in [*arguments, "--optimizer.lr", 0.02]]) == 0
    return output


IDS = torch.tensor([[5, 9, 33, 2, 7, 60]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


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


def test_finetune_takes_flags_and_a_file(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {base}\ndata: [{data}]\nmethod: qlora\nrun: {{steps: 2, batch_size: 3}}\n"
    )
    status, out, _ = run(
        "finetune",
        "--config",
        file,
        "--output_dir",
        tmp_path / "out",
        *SMALL,
        "--optimizer.betas",
        "[0.8,0.9]",
    )
    assert status == 0
    assert "Method: qlora" in out
    assert "training: 27 records" in out
    assert "held out: 3 records" in out
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert saved["run"]["batch_size"] == 4  # the flag wins over the file
    assert saved["optimizer"]["betas"] == [0.8, 0.9]


def test_resume_command_is_accepted(run: Run, trained: Path) -> None:
    import shlex

    arguments = shlex.split(resume_command(trained))
    assert arguments[0] == "pyfast"
    status, out, _ = run(*arguments[1:])
    assert status == 0
    assert "8 of 8 steps are done" in out


def test_generate_uses_the_adapter(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "generate",
        "--adapter",
        trained / "adapter",
        "--dtype",
        "fp32",
        "--max_new_tokens",
        5,
    ]
    status, out, _ = run(*arguments, "--prompt", "w3 w4")
    assert status == 0
    assert set(out.split()) <= {f"w{i}" for i in range(62)}
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w4\n\n"))
    assert run(*arguments)[1] == out


def test_merge_gives_a_model_that_transformers_loads(
    run: Run, base: Path, trained: Path, tmp_path: Path
) -> None:
    adapter = trained / "adapter"
    status, out, _ = run(
        "merge", "--adapter", adapter, "--output", tmp_path / "m", "--dtype", "fp32"
    )
    assert status == 0
    assert f"pyfast generate --model {tmp_path / 'm'}" in out
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
    assert run("quantize", "--model", base, "--output", tmp_path / "q")[0] == 0
    assert (
        run("convert", "--source", tmp_path / "q", "--output", tmp_path / "d", "--dtype", "fp32")[0]
        == 0
    )
    merge = [
        "merge",
        "--adapter",
        adapter,
        "--output",
        tmp_path / "m",
        "--dtype",
        "fp32",
        "--nf4",
        "true",
    ]
    assert run(*merge)[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = adapted_logits(tmp_path / "d", adapter).float()
    torch.testing.assert_close(logits(merged), expected, rtol=2e-2, atol=2e-2)
    unrounded = adapted_logits(base, adapter).float()
    assert (logits(merged) - unrounded).norm() > 3 * (logits(merged) - expected).norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("nested", [True, False])
def test_quantized_model_loads_in_bitsandbytes_and_converts_back(
    run: Run, base: Path, tmp_path: Path, nested: bool, family: str
) -> None:
    source = base
    if family == "gpt2":
        source = tmp_path / "gpt2"
        torch.manual_seed(1)
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2)).save_pretrained(
            source
        )
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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by PEFT
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


def test_info_shows_every_part(run: Run) -> None:
    status, out, _ = run("info")
    assert status == 0
    for title in ("Build", "Devices", "Libraries", "Support", "Kernels"):
        assert f"{title}\n" in out
    assert "nf4_dequantize on cpu" in out
    assert "Llama" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["finetune", "--data", "no.jsonl", "--model", "{base}"],
            "ConfigError [PF018] data file 'no.jsonl'",
        ),
        (["finetune", "--run.batch_size", "0"], "ConfigError [PF018] run.batch_size is 0"),
        (["generate", "--adapter", "nowhere"], "'nowhere' is not an adapter directory"),
        (["generate", "--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (
            ["merge", "--adapter", "a", "--output", "{base}"],
            "exists already. Fix: another --output.",
        ),
        (["convert", "--source", "nowhere", "--output", "new"], "'nowhere' does not exist"),
        (
            ["quantize", "--model", "/nowhere", "--output", "new"],
            "cannot load the model '/nowhere'",
        ),
    ],
)
def test_user_error_is_one_sentence_and_status_2(
    run: Run,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*(argument.format(base=base) for argument in arguments))
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_debug_shows_the_traceback(run: Run) -> None:
    from pyfast.errors import ConfigError

    with pytest.raises(ConfigError):
        run("finetune", "--run.batch_size", "0", "--debug")


def test_wrong_flag_is_told_by_the_parser(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("finetune", "--run.batchsize", "3")
    assert caught.value.code == 2
    assert "batchsize" in capsys.readouterr().err


def test_ctrl_c_outside_the_loop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyfast.cli

    def interrupt() -> None:
        """Stands for a command that is stopped while it loads."""
        raise KeyboardInterrupt

    monkeypatch.setitem(pyfast.cli._COMMANDS, "info", interrupt)
    status, _, err = run("info")
    assert (status, err) == (130, "Interrupted.\n")


@pytest.mark.slow
def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyfast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pyfast ")
