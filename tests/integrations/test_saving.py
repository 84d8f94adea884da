# SPDX-License-Identifier: Apache-2.0
"""Saving an adapter when it is interrupted, when a link lies in wait, and from several threads."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
import transformers

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterMismatchError
from tests.models import fingerprint, llama, logits, randomise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(alpha, seed=1):
    return randomise(pyfast.apply(llama(), LoraConfig(lora_alpha=alpha)), seed=seed)


def cut(monkeypatch, at):
    """Interrupt the given call of Path.replace."""
    original, calls = Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("at", [1, 2])
def test_weights_of_one_save_and_the_config_of_another(at, tmp_path, monkeypatch):
    pyfast.save_adapter(adapted(8), tmp_path)
    cut(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        pyfast.save_adapter(adapted(64, seed=2), tmp_path)
    monkeypatch.undo()
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    model = llama()
    if at == 1:
        assert torch.equal(logits(pyfast.load_adapter(model, tmp_path)), logits(adapted(8)))
        return
    before = fingerprint(model)
    with pytest.raises(AdapterMismatchError) as caught:
        pyfast.load_adapter(model, tmp_path)
    assert str(caught.value) == (
        f"[PF002] {tmp_path / WEIGHTS} was not saved with the {CONFIG} beside it: a save was interrupted, or "
        "the config was edited. The adapter was NOT applied. Fix: fetch or save it again"
    )
    assert fingerprint(model) == before


def test_fields_that_do_not_bear_on_the_numbers_may_be_edited(tmp_path):
    model = adapted(8)
    pyfast.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    values.update(base_model_name_or_path="moved", inference_mode=False, loftq_config={})
    del values["revision"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert torch.equal(logits(pyfast.load_adapter(llama(), tmp_path)), logits(model))


def test_links_are_not_written_through(tmp_path):
    victim, directory = tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("precious")
    directory.mkdir()
    for name in (CONFIG, WEIGHTS):
        for link in (name, f"{Path(name).stem}.tmp", f"{name}.tmp"):
            (directory / link).symlink_to(victim)
    pyfast.save_adapter(adapted(8), directory)
    assert victim.read_text() == "precious"
    assert not (directory / CONFIG).is_symlink()
    assert not (directory / WEIGHTS).is_symlink()
    pyfast.load_adapter(llama(), directory)


def test_threads_that_save_to_one_directory(tmp_path):
    models = [adapted(8, seed=s) for s in range(4)]
    failures, start = [], threading.Barrier(len(models))

    def work(model):
        start.wait()
        try:
            for _ in range(20):
                pyfast.save_adapter(model, tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    loaded = logits(pyfast.load_adapter(llama(), tmp_path))
    assert any(torch.equal(loaded, logits(model)) for model in models)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(umask, tmp_path):
    before = os.umask(umask)
    try:
        pyfast.save_adapter(adapted(8), tmp_path / "new")
        (tmp_path / "ordinary").touch()
    finally:
        os.umask(before)
    expected = (tmp_path / "ordinary").stat().st_mode
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "new").iterdir()}
    assert modes == {CONFIG: expected, WEIGHTS: expected}


def test_a_failed_save_leaves_no_temporaries(tmp_path, monkeypatch):
    model = adapted(8)

    def full(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyfast.integrations.adapter_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pyfast.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_merged_adapters_that_save_pretrained_writes_are_told(tmp_path):
    model = adapted(8)
    expected = logits(model)
    model.save_pretrained(tmp_path / "before")
    pyfast.merge(model)
    with pytest.warns(UserWarning, match="merged") as caught:
        model.save_pretrained(tmp_path / "merged")
    assert [(str(found.message), found.filename) for found in caught] == [
        (
            "save_pretrained writes the adapters of LlamaForCausalLM alone, though ['default'] are merged "
            "into its weights; call pyfast.unload(model) first to write the merged model",
            __file__,
        )
    ]
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("before", "merged")]
    assert files[0] == files[1]
    pyfast.unload(model).save_pretrained(tmp_path / "whole")  # without a word, and the fix
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(whole), expected, atol=1e-5)
