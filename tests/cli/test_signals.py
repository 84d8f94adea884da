# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM at any time of a command: a quiet end, the usual status, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pyfast.cli import commands, program
from pyfast.train import loop
from tests.cli.conftest import SMALL, Run


@pytest.fixture(autouse=True)
def handler_of_before() -> Iterator[None]:
    """A handler of SIGTERM that a command may replace for its own time only."""

    def fail(*_: object) -> NoReturn:
        pytest.fail("SIGTERM was not handled")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    assert signal.signal(signal.SIGTERM, before) is fail


def terminate(*_: object, **__: object) -> NoReturn:
    """Stands for work in the middle of which SIGTERM comes."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    pytest.fail("SIGTERM did not end the work")


@pytest.mark.parametrize("command", ["merge", "quantize", "convert"])
def test_sigterm_leaves_no_directory(
    run: Run, base: Path, trained: Path, tmp_path: Path, monkeypatch: Any, command: str
) -> None:
    """Not even if it is sent twice, as some programs do."""
    clean = tempfile.TemporaryDirectory.cleanup

    def clean_late(directory: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        clean(directory)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", clean_late)
    monkeypatch.setattr(commands, "save_tokenizer", terminate)  # the weights are written by then
    source = {"merge": ("--adapter", trained / "adapter"), "quantize": ("--model", base)}
    arguments = source.get(command, ("--source", base))
    with pytest.raises(SystemExit) as caught:
        run(command, *arguments, "--output", tmp_path / "a" / "out")
    assert caught.value.code == 143
    assert not list(tmp_path.iterdir())


def test_second_sigterm_ends_a_run_at_once(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The first one asks for a checkpoint after the step, which this step never comes to."""

    def step(*_: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGTERM)
        terminate()

    monkeypatch.setattr(loop.Trainer, "step", step)
    arguments = ["--model", base, "--data", data, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as caught:
        run("finetune", *arguments, *SMALL)
    assert caught.value.code == 143
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_ctrl_c_while_a_command_works(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        """Stands for a command that is stopped while it loads."""
        raise KeyboardInterrupt

    monkeypatch.setitem(program._COMMANDS, "info", interrupt)
    status, _, err = run("info")
    assert (status, err) == (130, "Interrupted.\n")
    with pytest.raises(KeyboardInterrupt):
        run("info", "--debug")


@pytest.fixture
def interrupted(tmp_path: Path) -> Run:
    """Run Python in an environment where Ctrl-C comes as soon as a module is asked for."""

    def call(module: str, *arguments: object) -> tuple[int, str, str]:
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "class Interrupting:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {module!r}:\n"
            "            raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Interrupting())\n"
        )
        command = [sys.executable, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    return call


MAIN = "import sys\nfrom pyfast.cli import main\nsys.exit(main())\n"


@pytest.mark.parametrize("module", ["torch", "pyfast.train", "jsonargparse", "transformers"])
def test_ctrl_c_while_modules_are_imported(interrupted: Run, tmp_path: Path, module: str) -> None:
    script = tmp_path / "pyfast"
    script.write_text(MAIN)
    for command in ([script], ["-m", "pyfast"]):
        assert interrupted(module, *command, "info") == (130, "", "Interrupted.\n")
        _, _, err = interrupted(module, *command, "info", "--debug")
        assert err.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_in_a_program_that_imports_pyfast(interrupted: Run) -> None:
    status, _, err = interrupted("torch", "-c", "import pyfast", "pyfast")
    assert status != 130
    assert err.rstrip().endswith("KeyboardInterrupt")
