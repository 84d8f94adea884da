# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or absent: safetensors and JSON, hashed, synced, renamed into place.

checkpoints/
    latest                       name of the newest checkpoint
    step-000100/
        manifest.json            size and SHA-256 of every other file
        trainer.json             step, settings, Python and numpy RNG
        training.safetensors     optimiser state, torch RNG, trained parameters of an adapter run
        adapter/ or model/       what load_adapter or from_pretrained reads
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pyfast.errors import CheckpointCorruptError, CheckpointWriteError, ResumeError
from pyfast.train.optim import set_state, state_shapes, state_tensors

_MANIFEST = "manifest.json"
_TRAINER = "trainer.json"
_TRAINING = "training.safetensors"
_LATEST = "latest"
_TEMPORARY = ".tmp-"
_FORMAT = 1

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    exact_match_before: float | None = None
    exact_match: float | None = None


# --- the state of a run as named tensors and plain values ---


def training_tensors(
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    with_parameters: bool,
) -> Tensors:
    """Optimiser state, torch RNG and, if asked, the trained parameters, as CPU tensors."""
    tensors: Tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{index}"] = state
    for name, parameter in parameters.items():
        if with_parameters:
            tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in state_tensors(optimizer, parameter).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def trainer_values(progress: Progress, settings: dict[str, Any]) -> dict[str, Any]:
    """What is not a tensor: progress, settings that a resumed run must share, Python and numpy RNG."""
    kind, keys, position, has_gauss, cached = np.random.get_state(
        legacy=True
    )  # the process-wide generator
    version, internal, gauss = random.getstate()
    return {
        "format": _FORMAT,
        "progress": asdict(progress),
        "settings": settings,
        "python_rng": [version, list(internal), gauss],
        "numpy_rng": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


# --- writing ---


def save(
    directory: Path,
    tensors: Tensors,
    values: dict[str, Any],
    write_model: Callable[[Path], None],
    keep_last: int,
) -> Path:
    """Write a checkpoint, point `latest` at it and drop the oldest.

    Args:
        directory: The directory of all checkpoints of the run.
        tensors: From `training_tensors`.
        values: From `trainer_values`; the step in it names the checkpoint.
        write_model: Writes the adapter or the model below the directory it is given.
        keep_last: Number of checkpoints to keep.

    Returns:
        The checkpoint.

    Raises:
        CheckpointWriteError: A file could not be written. Earlier checkpoints are untouched.
    """
    name = f"step-{values['progress']['step']:06d}"
    final = directory / name
    temporary = directory / f"{_TEMPORARY}{name}"
    if read_latest(directory) == name:
        return final
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clean(directory)
        temporary.mkdir()
        save_file(tensors, temporary / _TRAINING)
        honour_umask(temporary)
        (temporary / _TRAINER).write_text(json.dumps(values), encoding="utf-8")
        write_model(temporary)
        files = {file.relative_to(temporary).as_posix(): _entry(file) for file in _files(temporary)}
        manifest = {"format": _FORMAT, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync_tree(temporary)
        if final.exists():  # left by a killed run before `latest` named it
            final.rename(directory / f"{_TEMPORARY}replaced-{name}")
        temporary.rename(final)
        _sync(directory)
        _point_latest(directory, name)
        for old in _names(directory)[:-keep_last]:
            # Out of sight in one step first: a kill in the middle leaves no half of a checkpoint.
            (directory / old).rename(directory / f"{_TEMPORARY}old-{old}")
        clean(directory)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise _write_error(directory, name, error, needed) from error
    return final


def honour_umask(directory: Path) -> None:
    """Let those read and write the files of a new directory whom the umask lets into it: safetensors makes
    such as only their owner can read."""
    for file in _files(directory):
        file.chmod(directory.stat().st_mode & 0o666)


def _write_error(directory: Path, name: str, error: Exception, needed: int) -> CheckpointWriteError:
    shutil.rmtree(directory / f"{_TEMPORARY}{name}", ignore_errors=True)
    parent = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    text = f"cannot write checkpoint '{directory / name}': {error}. "
    if (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or "os error 28" in str(error).lower()
    ):
        text += f"It needs more than {needed / 1e6:,.1f} MB; {free / 1e6:,.1f} MB are free. "
    latest = read_latest(directory)
    text += f"The checkpoint {latest} is intact. " if latest else "There is no earlier checkpoint. "
    onward = f"--output_dir {directory.parent} --resume true" if latest else "start again"
    return CheckpointWriteError(f"{text}Fix: free space or allow writing there, then {onward}.")


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _point_latest(directory: Path, name: str) -> None:
    temporary = directory / f"{_TEMPORARY}{_LATEST}"
    temporary.write_text(f"{name}\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(directory / _LATEST)
    _sync(directory)


def clean(directory: Path) -> None:
    """Remove what a killed save left behind."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- reading ---


def _names(directory: Path) -> list[str]:
    """The checkpoints, oldest first; from step 1,000,000 on their names grow longer."""
    found = [path.name for path in directory.glob("step-*") if path.is_dir()]
    steps = [name for name in found if name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=lambda name: int(name.removeprefix("step-")))


def read_latest(directory: Path) -> str | None:
    """Name of the newest complete checkpoint, or None."""
    file = directory / _LATEST
    if not file.is_file():
        return None
    name = file.read_text(encoding="utf-8", errors="replace").strip()
    return name if name in _names(directory) else None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read but not applied."""

    path: Path
    tensors: Tensors
    values: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        return Progress(**self.values["progress"])


def load(directory: Path) -> Checkpoint:
    """Verify and read the newest checkpoint; nothing of the process is changed.

    Raises:
        ResumeError: There is no checkpoint, or it lacks a part.
        CheckpointCorruptError: A file is missing, has another size or another hash than was written.
    """
    name = read_latest(directory)
    if name is None:
        found = _names(directory)
        if not found:
            raise ResumeError(
                f"'{directory}' holds no checkpoint to resume from. Fix: --resume false"
            )
        raise CheckpointCorruptError(
            f"'{directory / _LATEST}' does not name a checkpoint. Found: {', '.join(found)}. "
            f"Fix: write '{found[-1]}' into that file."
        )
    path = directory / name
    _verify(path, directory)
    values = json.loads((path / _TRAINER).read_text(encoding="utf-8"))
    if values["format"] != _FORMAT:
        raise ResumeError(
            f"'{path}' has checkpoint format {values['format']}, this version reads {_FORMAT}. "
            "Fix: resume it with the version that wrote it."
        )
    return Checkpoint(path, load_file(path / _TRAINING), values)


def _verify(path: Path, directory: Path) -> None:
    """Compare every file with the manifest."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads(
            (path / _MANIFEST).read_text(encoding="utf-8")
        )["files"]
        expected = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path / _MANIFEST, f"unreadable ({error})", directory) from error
    present = {file.relative_to(path).as_posix() for file in _files(path)} - {_MANIFEST}
    for name in (_TRAINER, _TRAINING):
        if name not in expected:
            raise ResumeError(
                f"checkpoint '{path}' lacks {name}, so an exact resume is not possible."
            )
    for name in sorted(present | set(expected)):
        if name not in present:
            raise _corrupt(path / name, "the file is missing", directory)
        if name not in expected:
            raise _corrupt(path / name, "the file does not belong to the checkpoint", directory)
        size, digest = expected[name]
        actual = _entry(path / name)
        if actual["bytes"] != size:
            raise _corrupt(path / name, f"{actual['bytes']:,} of {size:,} bytes", directory)
        if actual["sha256"] != digest:
            raise _corrupt(path / name, "SHA-256 differs from the one that was written", directory)


def _corrupt(file: Path, what: str, directory: Path) -> CheckpointCorruptError:
    earlier = [name for name in _names(directory) if not file.is_relative_to(directory / name)]
    fix = (
        f"write '{earlier[-1]}' into '{directory / _LATEST}' to resume from there."
        if earlier
        else "start again with another output_dir."
    )
    return CheckpointCorruptError(f"'{file}': {what}. Nothing was loaded. Fix: {fix}")


def check_settings(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Refuse to resume a run under settings that would make it another run.

    Raises:
        ResumeError: A setting differs; the first few are named with both values.
    """
    saved = checkpoint.values["settings"]
    current = json.loads(json.dumps(settings))
    differing = [
        f"{key} (saved {saved.get(key)!r}, now {current.get(key)!r})"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ResumeError(
            f"checkpoint '{checkpoint.path}' was made under other settings: {'; '.join(differing[:4])}. "
            "Fix: resume with the config.yaml of the run, or train into another output_dir."
        )


def restore(
    checkpoint: Checkpoint,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    with_parameters: bool,
) -> None:
    """Put optimiser state, RNG and parameters back; all parts are checked before the first changes.

    Raises:
        ResumeError: A part is missing or has another shape or type.
    """
    tensors = checkpoint.tensors
    cuda = [f"rng.cuda.{index}" for index in range(torch.cuda.device_count())]
    needed: list[tuple[str, torch.Size | None]] = [
        ("rng.cpu", None),
        *((name, None) for name in cuda),
    ]
    states = state_shapes(optimizer) if checkpoint.progress.step else {}
    for name, parameter in parameters.items():
        if with_parameters:
            needed.append((f"parameter.{name}", parameter.shape))
        shapes = states.get(parameter, {})
        needed += [(f"optimizer.{key}.{name}", shape) for key, shape in shapes.items()]
    lacking = [name for name, _ in needed if name not in tensors]
    if lacking:
        raise ResumeError(
            f"checkpoint '{checkpoint.path}' lacks {len(lacking)} of {len(needed)} parts "
            f"(first: {lacking[0]}), so an exact resume is not possible. "
            "Fix: the same method, targets and devices as in the saved run."
        )
    for name, shape in needed:
        if shape is not None and tensors[name].shape != shape:
            raise ResumeError(
                f"checkpoint '{checkpoint.path}': {name} has shape {tuple(tensors[name].shape)}, "
                f"this run needs {tuple(shape)}. Fix: the same model and adapter options as in the saved run."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if with_parameters:
                parameter.copy_(tensors[f"parameter.{name}"])
            found = {key: tensors[f"optimizer.{key}.{name}"] for key in states.get(parameter, ())}
            set_state(optimizer, parameter, found)
    version, internal, gauss = checkpoint.values["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys_, *rest = checkpoint.values["numpy_rng"]
    np.random.set_state((kind, np.array(keys_, dtype=np.uint32), *rest))
    if cuda:
        torch.cuda.set_rng_state_all([tensors[name] for name in cuda])
    torch.set_rng_state(tensors["rng.cpu"])
