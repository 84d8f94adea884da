# SPDX-License-Identifier: Apache-2.0
"""Rules of the repository that would otherwise be wishes."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyfast
from benchmarks.cases import all_cases
from pyfast.train import default_data, default_model
from tests.cases import CASES

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sorted(
    path for folder in ("pyfast", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py*")
    if path.suffix in (".py", ".pyi")
)  # fmt: skip
CPP = sorted(
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")
)
BUILD = [
    ROOT / "Makefile",
    ROOT / ".ci" / "run",
    *ROOT.glob("**/CMakeLists.txt"),
    *(ROOT / "third_party").glob("*.cmake"),
]
BUILD = sorted(path for path in BUILD if not {".venv", "build"} & set(path.parts))
PUBLIC_OPS = sorted(
    name for name in pyfast.ops.__all__ if inspect.isfunction(getattr(pyfast.ops, name))
    and name != "recorded_kernels"
)  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PYTHON, *CPP], ids=name_of)
def test_file_stays_within_its_budget(path: Path) -> None:
    budget = 600 if path in CPP else 400
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= budget, f"{lines} lines: split it (budget {budget})"


@pytest.mark.parametrize("path", [*PYTHON, *CPP, *BUILD], ids=name_of)
def test_source_is_ascii_and_names_its_licence(path: Path) -> None:
    text = path.read_bytes()
    assert text.isascii(), "only ASCII; write other characters as escapes"
    head = text.decode().splitlines()[:2] or ["SPDX-License-Identifier: Apache-2.0"]  # empty file
    assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head)


@pytest.mark.parametrize("path", CPP, ids=name_of)
def test_only_bindings_know_python_and_nothing_knows_torch(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)
    foreign = re.compile(r"(torch|ATen|c10)/")
    python = re.compile(r"(Python\.h|pybind11/)")
    assert not [name for name in included if foreign.match(name)]
    if path.parent.name != "bindings":
        assert not [name for name in included if python.match(name)]


def test_changelog_covers_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {"Unreleased", project["version"]} & set(headings)


def test_requirements_are_exact_and_agree_with_the_code() -> None:
    pins: dict[str, str] = {}
    for file in ("requirements-dev.txt", "requirements-data.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                found = re.fullmatch(r"([\w.-]+)(\[\w+\])?==([\w.]+)", line)
                assert found, f"{file}: not an exact pin: {line}"
                pins[found[1]] = found[3]
    assert pins[default_model.PACKAGE] == default_model.VERSION
    assert pins[default_data.PACKAGE] == default_data.VERSION
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert f"nvidia-cutlass=={pins['nvidia-cutlass']}" in build


# --- no code from files -------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    "torch": {"load", "save"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "os": {"system", "popen"},
}
ALLOWED = {("pyfast/cli/commands.py", name) for name in ("torch.load", "pickle")}
"""`pyfast convert --trust_pickle`: asked for by name, reads tensors only, catches pickle's error."""


def unsafe_uses(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What could run code that a file or a string brings along: its name and where it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNSAFE_MODULES:
                    yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in UNSAFE_MODULES:
                yield module, node
            for alias in node.names:
                if alias.name in UNSAFE_ATTRIBUTES.get(module, set()):
                    yield f"{module}.{alias.name}", node
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                yield node.func.id, node
            for keyword in node.keywords:
                unsafe = keyword.arg in ("allow_pickle", "trust_remote_code", "shell")
                if unsafe and getattr(keyword.value, "value", True) is not False:
                    yield keyword.arg, node
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if node.attr in UNSAFE_ATTRIBUTES.get(owner, set()):
                yield f"{owner}.{node.attr}", node


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("from torch import load", "torch.load"),
        ("f = torch.load", "torch.load"),
        ("yaml.load(text, Loader)", "yaml.load"),
        ("exec(text)", "exec"),
        ("np.load(f, allow_pickle=True)", "allow_pickle"),
        ("from_pretrained(d, trust_remote_code=flag)", "trust_remote_code"),
    ],
)
def test_the_guard_sees(source: str, name: str) -> None:
    assert [found for found, _ in unsafe_uses(ast.parse(source))] == [name]


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "yaml.safe_load(text)", "json.load(f)", "np.load(f, allow_pickle=False)"],
)
def test_the_guard_lets_pass(source: str) -> None:
    assert not list(unsafe_uses(ast.parse(source)))


@pytest.mark.parametrize(
    "path", [path for path in PYTHON if path.is_relative_to(ROOT / "pyfast")], ids=name_of
)
def test_the_package_runs_no_code_from_files(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    uses = [name for name, _ in unsafe_uses(tree) if (name_of(path), name) not in ALLOWED]
    assert not uses


def test_the_one_exception_reads_tensors_only() -> None:
    nodes = [
        node
        for path in (ROOT / "pyfast").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    loads = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert len(loads) <= 1
    for call in loads:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("weights_only") == "True"
    used = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} <= {"pickle.UnpicklingError"}


# --- what is public is described, tested and measured -------------------------------------------


def test_no_other_name_is_shown() -> None:
    """Beside the modules inside of the package."""
    shown = {name for name in dir(pyfast) if not name.startswith("_")} - set(pyfast.__all__)
    others = {
        name for name in shown if getattr(getattr(pyfast, name), "__name__", "") != f"pyfast.{name}"
    }
    assert not others


@pytest.mark.parametrize("name", pyfast.__all__)
def test_public_name_is_documented(name: str) -> None:
    value = getattr(pyfast, name)
    doc = inspect.getdoc(value) or ""
    assert doc, f"pyfast.{name} has no docstring"
    # A dataclass without one shows its signature.
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_public_op_documents_its_arguments_and_errors(name: str) -> None:
    function = getattr(pyfast.ops, name)
    doc = inspect.getdoc(function) or ""
    assert "Args:" in doc
    assert "Raises:" in doc
    missing = [p for p in inspect.signature(function).parameters if f"\n    {p}:" not in doc]
    assert not missing, f"arguments without a description: {missing}"


def test_every_op_has_a_test_case() -> None:
    covered = {case.op for case in CASES}
    assert covered >= set(pyfast.ops.OPS), "add a case to tests/cases.py"


def test_every_public_op_has_a_benchmark() -> None:
    for device in ("cpu", "cuda"):
        covered = {op for case in all_cases(device) for op in case.covers}
        assert covered >= set(PUBLIC_OPS), "add a case to benchmarks/cases.py"
