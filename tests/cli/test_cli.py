# SPDX-License-Identifier: Apache-2.0
"""`finetune` and `generate`, and how they tell a user's mistakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyfast.train import default_model
from pyfast.train.command import program
from pyfast.train.run import resume_command
from tests.cli.conftest import SMALL, Run
from tests.models import VOCAB


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

    arguments = resume_command(trained).removeprefix(f"{program()} ")
    status, out, _ = run(*shlex.split(arguments))
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
    assert set(out.split()) <= {f"w{i}" for i in range(VOCAB - 2)}
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w4\n\n"))
    assert run(*arguments)[1] == out


class Took(Exception):
    """Carries the arguments that a command got."""


@pytest.mark.parametrize("text", ["# w1", "null", "~", "NULL", "a: b", "[1]", '"q"', "1", "-"])
def test_text_is_taken_as_it_was_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """YAML, which other values are read as, has its own meaning for all of these."""
    from pyfast.cli import program

    def take(command: str, values: dict[str, Any]) -> None:
        raise Took(values)

    monkeypatch.setattr(program, "_call", take)
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: another\ndataset: {eval_data: null}\n")
    flags = {"finetune": "output_dir", "generate": "prompt", "merge": "model"}
    needed = {"finetune": ["--config", file], "merge": ["--adapter", "a", "--output", "b"]}
    for command, flag in flags.items():
        for written in ([f"--{flag}", text], [f"--{flag}={text}"]):
            with pytest.raises(Took) as caught:
                run(command, *needed.get(command, []), *written)
            assert caught.value.args[0][flag] == text
    with pytest.raises(Took) as caught:
        run("finetune", "--config", file)
    assert caught.value.args[0]["output_dir"] == "another"
    assert caught.value.args[0]["dataset"].eval_data is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: 5", "run is 5; it must be a mapping of settings"),
        ("quant: null", "quant is None; it must be a mapping"),
        ("optimizer: [1]", "optimizer is [1]; it must be a mapping"),
        ("model: \udcff", "the --config file is not UTF-8: "),
    ],
)
def test_config_file_of_another_form(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit) as caught:
        run("finetune", "--config", file)
    assert caught.value.code == 2
    error, options = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert options.startswith("All options: pyfast")


@pytest.mark.parametrize("name", ["model", "data", "run.batch_size", "optimizer.betas"])
def test_null_where_a_value_is_needed(run: Run, tmp_path: Path, name: str) -> None:
    group, _, key = name.rpartition(".")
    file = tmp_path / "c.yaml"
    file.write_text(f"{group}: {{{key}: null}}\n" if group else f"{key}: null\n")
    status, _, err = run("finetune", "--config", file)
    assert status == 2
    assert f"ConfigError [PF018] {name} is null. Fix: leave it out" in err


@pytest.mark.parametrize("flag", [["generate", "--prompt"], ["finetune", "--output_dir"]])
def test_argument_that_is_not_utf_8(
    run: Run, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*flag, os.fsdecode(b"o\xff"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument 3 is not UTF-8: 'o\\udcff'\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_not_utf_8(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"w3 \xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stream)
    status, _, err = run("generate", "--model", base, "--max_new_tokens", 1)
    assert status == 2
    assert err.startswith("ConfigError [PF018] standard input is not UTF-8: ")
    assert err.count("\n") == 1


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
        (["generate", "--prompt", " "], "the prompt is empty"),
        (["generate", "--device", "meta"], "run.device is 'meta'"),
        (["generate", "--model", "no/such"], "the Hugging Face hub cannot be asked"),
        (["convert", "--source", "{base}/config.json", "--output", "new"], "nor an adapter file"),
        (
            ["merge", "--adapter", "a", "--output", "{base}"],
            "exists already. Fix: another --output.",
        ),
        (["convert", "--source", "nowhere", "--output", "new"], "'nowhere' does not exist"),
        (
            ["quantize", "--model", "/nowhere", "--output", "new"],
            "the model '/nowhere' is neither a directory here",
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


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("finetune --run.step 3", "--run.step 3. Did you mean --run.steps?"),
        ("finetune --run.stepps=3", "--run.stepps=3. Did you mean --run.steps?"),
        ("finetune --adapter.ra 3 --model x", "--adapter.ra 3. Did you mean --adapter.r?"),
        ("generate --promp hi", "--promp hi. Did you mean --prompt?"),
        ("merge --adapter a --outp b", "--outp b. Did you mean --output?"),
        ("info --deb", "--deb. Did you mean --debug?"),
        ("generate hello", "hello"),
    ],
)
def test_unknown_or_shortened_flag_is_refused(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments.split())
    command = arguments.split()[0]
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: unrecognized arguments: {hint}\nAll options: pyfast {command} --help\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("finetune --method loro",
         "method is 'loro'; it must be one of lora, qlora, sft, ia3, p-tuning, adapters"),
        ("finetune --run.dtype=", "run.dtype is ''; it must be one of auto, bf16, fp32"),
        ("convert --source a --output b --dtype q", "dtype is 'q'; it must be one of bf16, fp16, fp32"),
        ("finetune --run.steps x", "run.steps is 'x'; it must be an integer"),
        ("finetune --optimizer.lr x", "optimizer.lr is 'x'; it must be a number"),
        ("finetune --optimizer.betas 5", "optimizer.betas is '5'; it must be a list of two numbers"),
        ("finetune --resume 7", "resume is '7'; it must be true or false"),
    ],
)  # fmt: skip
def test_value_of_another_type_is_told_in_words(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {message}"


def test_every_type_of_a_setting_has_words() -> None:
    from pyfast.cli import program

    for parser in program._parsers()[1].values():
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                assert program._allowed(action._typehint)


def test_no_command_shows_them_all(run: Run) -> None:
    status, _, err = run()
    assert status == 2
    for command in ("finetune", "generate", "merge", "quantize", "convert", "info"):
        assert f"\n    {command} " in err


def test_adapter_of_the_default_model_finds_it_on_any_machine(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one user trained, another generates with and merges, whose cache lies elsewhere."""
    place = f"{default_model.NAME}-{default_model.VERSION}"
    for user in ("one", "two"):
        shutil.copytree(base, tmp_path / user / place)
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "one"))
    output = tmp_path / "out"
    run("finetune", "--data", data, "--output_dir", output, "--run.steps", 2, *SMALL)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert str(tmp_path) not in json.dumps(config)
    shutil.rmtree(tmp_path / "one")
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "two"))
    adapter = ("--adapter", output / "adapter")
    status, _, err = run("generate", *adapter, "--prompt", "w3 w4", "--max_new_tokens", 2)
    assert (status, err.count("\n")) == (0, 1)
    assert "Base: the default model" in err
    assert run("merge", *adapter, "--output", tmp_path / "merged")[0] == 0


def test_relative_paths_hold_in_another_directory(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    shutil.copytree(base, place / "base")
    for file in ("train", "held"):
        shutil.copyfile(data, place / f"{file}.jsonl")
    monkeypatch.chdir(place)
    split = ["--dataset.split_by", "prompt", "--dataset.eval_data", "held.jsonl"]
    (place / "held.jsonl").write_text('{"input": "w70 w71", "output": "w3"}\n')
    named = ["--model", "base", "--data", "train.jsonl", "--output_dir", "out", *split]
    arguments = ["finetune", *named, "--run.steps", 1, *SMALL]
    assert run(*arguments)[0] == 0
    assert run(*arguments, "--resume", "true")[0] == 0  # by the names of the first time
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("finetune", "--config", "place/out/config.yaml", "--resume", "true")
    assert status == 0
    assert "1 of 1 steps are done" in out
    adapter = place / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")
    assert config["task_type"] == "CAUSAL_LM"
    assert run("generate", "--adapter", adapter, "--prompt", "w3", "--max_new_tokens", 1)[0] == 0


@pytest.mark.parametrize("command", ["merge", "convert", "quantize"])
def test_failed_command_leaves_no_directory(run: Run, tmp_path: Path, command: str) -> None:
    source = tmp_path / "damaged"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "damaged"}')
    (source / "adapter_model.safetensors").write_bytes(b"no tensors")
    option = {"merge": "--adapter", "convert": "--source", "quantize": "--model"}[command]
    status, _, err = run(command, option, source, "--output", tmp_path / "a" / "b" / "c")
    assert status == 2
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyfast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pyfast ")
