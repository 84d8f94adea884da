# SPDX-License-Identifier: Apache-2.0
"""P-tuning's files: PEFT uses ours, we use PEFT's, and training goes on from ours."""

import json

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import PromptEncoderConfig
from pyfast.errors import AdapterMismatchError, NonFiniteError
from pyfast.nn.prompt import PromptTable
from tests.family_models import VARIANTS, batch, outputs, variant
from tests.methods.test_p_tuning import V, config, prompted
from tests.models import fingerprint, gpt2, llama, logits, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
WEIGHTS, TRAINING = "adapter_model.safetensors", "adapter_training.safetensors"


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_uses_ours(name, tmp_path):
    ours = prompted(variant(name))
    pyfast.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(variant(name), tmp_path)
    with torch.no_grad():
        found = theirs(**batch(ours)).logits
    if not ours.config.is_encoder_decoder:
        found = found[:, V:]
    torch.testing.assert_close(found, outputs(ours))
    assert load_file(tmp_path / WEIGHTS).keys() == pyfast.adapter_state_dict(ours).keys()


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_we_use_pefts(name, kind, tmp_path):
    base = variant(name)
    two = base.config.is_encoder_decoder
    options = {"task_type": "SEQ_2_SEQ_LM" if two else "CAUSAL_LM", "num_virtual_tokens": V}
    theirs = get_peft_model(
        base, peft.PromptEncoderConfig(encoder_reparameterization_type=kind, **options)
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = pyfast.load_adapter(variant(name), tmp_path)
    with torch.no_grad():
        expected = theirs(**batch(model)).logits
    torch.testing.assert_close(outputs(model), expected if two else expected[:, V:])
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="prompt_embeddings will be trained as it stands"):
        again = pyfast.load_adapter(variant(name), tmp_path, trainable=True)
    trained = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert trained.keys() == {"prompt_encoder.default.embedding.weight"}
    assert torch.equal(outputs(again), outputs(model))
    again(**batch(again)).loss.backward()
    assert trained.popitem()[1].grad.abs().sum() > 0
    pyfast.save_adapter(model, tmp_path / "again")
    assert not (tmp_path / "again" / TRAINING).exists()
    saved, stored = (load_file(tmp_path / at / WEIGHTS) for at in ("again", "."))
    assert saved.keys() == stored.keys()
    assert torch.equal(saved["prompt_embeddings"], stored["prompt_embeddings"])


@pytest.mark.parametrize("kind", ["MLP", "LSTM", "NEMO"])
def test_training_goes_on_where_it_was_saved(kind, tmp_path):
    model = pyfast.apply(llama(), config(encoder_reparameterization_type=kind))
    train(model, steps=2)
    pyfast.save_adapter(model, tmp_path)
    again = pyfast.load_adapter(llama(), tmp_path, trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert train(again, steps=3) == train(model, steps=3)
    used = pyfast.load_adapter(llama(), tmp_path)
    assert isinstance(used.prompt_encoder.default, PromptTable)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded)[:, V:], logits(used))


def test_a_later_save_without_encoder_leaves_no_old_one(tmp_path):
    pyfast.save_adapter(prompted(llama()), tmp_path)
    table = pyfast.load_adapter(llama(), tmp_path)
    pyfast.save_adapter(table, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]


def test_files_that_do_not_fit_change_nothing(tmp_path):
    pyfast.save_adapter(prompted(llama()), tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, TRAINING)}
    tensors = load_file(tmp_path / TRAINING)
    key = next(iter(tensors))
    pyfast.save_adapter(pyfast.apply(llama(), config()), tmp_path / "other")
    hostile = {
        "missing": (AdapterMismatchError, {k: v for k, v in tensors.items() if k != key}),
        "shape": (AdapterMismatchError, tensors | {key: torch.ones(2)}),
        "nan": (NonFiniteError, tensors | {key: tensors[key] * float("nan")}),
        "of another save": (AdapterMismatchError, (tmp_path / "other" / TRAINING).read_bytes()),
        "torn": (AdapterMismatchError, good[TRAINING][:-9]),
    }
    for what, (error, content) in hostile.items():
        if isinstance(content, bytes):
            (tmp_path / TRAINING).write_bytes(content)
        else:
            metadata = {"pyfast_adapter_sha256": digest(tmp_path / WEIGHTS)}
            save_file(content, tmp_path / TRAINING, metadata=metadata)
        model = llama()
        before = fingerprint(model)
        with pytest.raises(error):
            pyfast.load_adapter(model, tmp_path, trainable=True)
        assert fingerprint(model) == before, what
        assert not model._forward_pre_hooks
        pyfast.load_adapter(model, tmp_path)  # needs no encoder
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_virtual_tokens": 6}))
    with pytest.raises(AdapterMismatchError):
        pyfast.load_adapter(llama(), tmp_path)


def digest(path):
    """Our checksum in a file's header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["pyfast_sha256"]


def test_trainer_saves_and_resumes(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in torch.arange(3, 15).expand(16, 12)]

    def run(directory, steps, resume=None):
        arguments = transformers.TrainingArguments(
            str(directory), max_steps=steps, save_steps=2, logging_steps=1, learning_rate=1e-2,
            per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to=[], use_cpu=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        torch.manual_seed(0)
        model = pyfast.apply(gpt2(), PromptEncoderConfig(num_virtual_tokens=4))
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        predicted = trainer.predict(data)
        assert predicted.predictions.shape[:2] == predicted.label_ids.shape
        return dict(model.prompt_encoder.named_parameters()), trainer.state.log_history

    whole, history = run(tmp_path / "a", 4)
    assert history[0]["loss"] > history[3]["loss"]
    assert (tmp_path / "a" / "checkpoint-4" / TRAINING).is_file()
    resumed, _ = run(tmp_path / "b", 4, str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
