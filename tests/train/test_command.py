# SPDX-License-Identifier: Apache-2.0
"""The commands that a run prints can be called from where it was called."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast.train.command import program


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bin of an environment with a `pyfast` that says where it lies; Python is not started from it."""
    directory = tmp_path / "my env" / "bin"
    directory.mkdir(parents=True)
    script = directory / "pyfast"
    script.write_text('#!/bin/sh\necho "$0"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(directory / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return directory


def called(command: str) -> str:
    shell = ["sh", "-c", command]
    return subprocess.run(shell, check=True, capture_output=True, text=True).stdout


def test_its_path_where_it_is_not_found(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shlex.split(program()) == [str(environment / "pyfast")]
    assert called(program()).strip() == str(environment / "pyfast")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(program()) == ["my env/bin/pyfast"]
    assert called(program()).strip() == "my env/bin/pyfast"


def test_its_name_where_that_finds_it(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin:/bin")
    assert program() == "pyfast"
    other = tmp_path / "other"
    other.mkdir()
    (other / "pyfast").write_text("#!/bin/sh\n")
    (other / "pyfast").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:{environment}:/usr/bin:/bin")
    assert shlex.split(program()) == [str(environment / "pyfast")]


def test_the_module_where_there_is_no_script(environment: Path) -> None:
    (environment / "pyfast").unlink()
    assert shlex.split(program()) == [str(environment / "python"), "-m", "pyfast"]
