# SPDX-License-Identifier: Apache-2.0
"""Users' existing code on an adapted model: Trainer, SFTTrainer, generate, accelerate, compile, copies."""

import copy
import io
import pickle
import shutil

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import pyfast
from tests.models import VOCAB, gpt2, llama, logits, plain, randomise, token_ids, train, twin

pytestmark = [
    # TRL asks transformers for a property by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

OPTIONS = {"target_modules": "all-linear", "r": 4}


def pair(make=llama):
    """Ours and PEFT's with the same adapter."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=make is gpt2, **OPTIONS)
    theirs = get_peft_model(make(), config)
    ours = pyfast.apply(make(), pyfast.LoraConfig(**OPTIONS))
    return randomise(ours), randomise(theirs)


def rows(count=8):
    ids = token_ids(count, 10)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, directory, **options):
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(directory),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 1,
            **options,
        }
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(4)
    )


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_trainer(checkpointing, tmp_path):
    ours, theirs = pair()
    options = {}
    if checkpointing:
        reentrant = {"use_reentrant": checkpointing == "reentrant"}
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": reentrant,
        }
    first = trainer(ours, tmp_path / "ours", **options)
    first.train()
    second = trainer(theirs, tmp_path / "theirs", **options)
    second.train()
    assert losses(first) == pytest.approx(losses(second), abs=1e-5)
    assert len(losses(first)) == 4
    first.save_model(str(tmp_path / "final"))
    checkpoint = tmp_path / "ours" / "checkpoint-4"
    base_bytes = sum(p.numel() * 4 for n, p in ours.named_parameters() if "lora_" not in n)
    for directory in (checkpoint, tmp_path / "final"):
        assert (directory / "adapter_config.json").is_file()
        stored = load_file(directory / "adapter_model.safetensors")
        assert stored.keys() == pyfast.adapter_state_dict(ours).keys()
        assert all(p.stat().st_size < base_bytes for p in directory.iterdir())
    assert not (tmp_path / "final" / "model.safetensors").exists()
    expected = load_file(tmp_path / "theirs" / "checkpoint-4" / "adapter_model.safetensors")
    for key, tensor in expected.items():
        assert torch.allclose(stored[key], tensor, atol=1e-4), key


def test_trainer_resumes(tmp_path):
    whole = trainer(pair()[0], tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = pyfast.apply(llama(), pyfast.LoraConfig(**OPTIONS))  # other random adapter
    again = trainer(model, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_copied_checkpoint_holds_the_adapter_once(tmp_path):
    whole = trainer(pair()[0], tmp_path / "run")
    whole.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "checkpoint-2", symlinks=True)
    shutil.rmtree(tmp_path / "run")
    stored = [
        p.name for p in (tmp_path / "checkpoint-2").glob("*.safetensors") if not p.is_symlink()
    ]
    assert stored == ["adapter_model.safetensors"]
    again = trainer(pair()[0], tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)


def test_trainer_restores_the_best_model(tmp_path):
    model, _ = pair()
    done = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.5,
        metric_for_best_model="eval_loss",
    )
    done.train()
    best = done.state.best_model_checkpoint
    expected = load_file(f"{best}/adapter_model.safetensors")
    for key, tensor in pyfast.adapter_state_dict(model).items():
        assert torch.equal(tensor, expected[key]), key


def test_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer(pair()[0], tmp_path, max_steps=2).train()
    model = pyfast.apply(llama(), pyfast.LoraConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(pyfast.errors.AdapterMismatchError, match="keys or shapes differ"):
        trainer(model, tmp_path / "x").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_trainer_takes_a_bitsandbytes_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=config,
            dtype=torch.float32,
            device_map="cpu",
        )

    ours = randomise(pyfast.apply(base(), pyfast.LoraConfig(**OPTIONS)))
    theirs = randomise(get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **OPTIONS)))
    first, second = trainer(ours, tmp_path / "ours"), trainer(theirs, tmp_path / "theirs")
    first.train(), second.train()
    assert losses(first) == pytest.approx(losses(second), abs=1e-4)
    assert (tmp_path / "ours" / "checkpoint-4" / "adapter_model.safetensors").is_file()


def tokenizer():
    words = [f"w{i}" for i in range(VOCAB - 3)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer(checkpointing, tmp_path):
    trl = pytest.importorskip("trl")
    text = [{"text": " ".join(f"w{(i * j) % 90}" for j in range(9))} for i in range(1, 9)]

    def run(model, name):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
            dataloader_pin_memory=False,
            seed=1,
        )
        done = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(text),
            processing_class=tokenizer(),
        )
        done.train()
        done.save_model(str(tmp_path / name / "final"))
        return losses(done)

    ours, theirs = pair()
    assert run(ours, "ours") == pytest.approx(run(theirs, "theirs"), abs=1e-5)
    stored = load_file(tmp_path / "ours" / "final" / "adapter_model.safetensors")
    assert stored.keys() == pyfast.adapter_state_dict(ours).keys()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(make, beams):
    ours, theirs = pair(make)
    options = {
        "input_ids": token_ids(2, 5),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_accelerate_prepare():
    ours, theirs = pair()
    results = []
    for model in (ours, theirs):
        helper = accelerate.Accelerator(cpu=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        loader = torch.utils.data.DataLoader(rows(), batch_size=2)
        model, optimizer, loader = helper.prepare(model, optimizer, loader)
        found = []
        for batch in loader:
            loss = model(**batch).loss
            helper.backward(loss)
            helper.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        results.append(found)
        helper.free_memory()
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.parametrize("accelerated", [False, True])
def test_compile_without_graph_breaks(accelerated):
    ours, theirs = pair()
    model = theirs if accelerated else ours
    if accelerated:
        pyfast.accelerate(model)
    ids = token_ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(input_ids=ids, use_cache=False).logits
    found = compiled(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)
    found.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch._dynamo.reset()


def test_copies_and_pickles():
    model, _ = pair()
    pyfast.apply(model, pyfast.LoraConfig(modules_to_save=["lm_head"]), adapter_name="b")
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(model)
        assert torch.equal(logits(other), logits(model))
        pyfast.set_adapter(other, "default")
        assert pyfast.adapter_state_dict(other).keys() == pyfast.adapter_state_dict(model).keys()
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_the_models_class_itself_is_untouched():
    before = dict(vars(transformers.LlamaForCausalLM))
    save = transformers.LlamaForCausalLM.save_pretrained
    pyfast.apply(llama(), pyfast.LoraConfig())
    assert dict(vars(transformers.LlamaForCausalLM)) == before
    assert transformers.LlamaForCausalLM.save_pretrained is save
    assert not llama()._hf_peft_config_loaded


def test_state_dict_round_trip_in_memory():
    model, _ = pair()
    other = pyfast.apply(llama(seed=3), pyfast.LoraConfig(**OPTIONS))
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert torch.equal(logits(other), logits(model))
    third = pyfast.apply(llama(), pyfast.LoraConfig(**OPTIONS))
    third.load_state_dict(pyfast.adapter_state_dict(model))
    assert torch.equal(logits(third), logits(model))


def test_own_loop_with_clipping_and_accumulation():
    ours, theirs = pair(gpt2)
    results = []
    for model in (ours, theirs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for step in range(4):
            ids = token_ids(2, 7, seed=step)
            (model(input_ids=ids, labels=ids).loss / 2).backward()
            if step % 2:
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
                optimizer.zero_grad()
        results.append({plain(n): p for n, p in model.named_parameters() if p.requires_grad})
    for name, parameter in results[1].items():
        assert torch.allclose(results[0][name], parameter, atol=1e-5), name


def test_gradient_checkpointing_alone():
    ours, _ = pair()
    other = twin(ours)
    other.train()
    other.gradient_checkpointing_enable({"use_reentrant": True})
    assert train(other) == pytest.approx(train(ours), abs=1e-6)
