# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from pyfast.cli import main
from pyfast.errors import DataError, EmptyTargetError
from pyfast.train.config import DatasetOptions
from pyfast.train.data import (
    IGNORED,
    Examples,
    collate,
    load_data,
    step_indices,
    tokenize,
    tokenize_apart,
)
from pyfast.train.forms import Record
from pyfast.train.loop import Trainer, finetune
from pyfast.train.model import choose_place, prepare_model, trainable_parameters
from pyfast.train.run import seed_everything
from tests.family_models import variant

Make = Callable[..., Any]


def one(record: Record, tokenizer: Any, max_length: int = 512) -> tuple[str, str, Examples]:
    """All text and the learned text of a record, as the tokenizer decodes them."""
    examples = tokenize([record], tokenizer, max_length)
    item = examples.items[0]
    return tokenizer.decode(item.tokens), tokenizer.decode(item.tokens[item.learned]), examples


def test_only_the_answer_and_its_end_are_learned(byte_tokenizer: Make) -> None:
    text, learned, _ = one(
        Record.pair("what \u00e9?", "it \U0001f600 is", "f", 1), byte_tokenizer()
    )
    assert text == "<|user|>what \u00e9?<|end|>\n<|assistant|>it \U0001f600 is<|end|>\n"
    assert learned == "it \U0001f600 is<|end|>"


def test_every_assistant_turn_is_learned(byte_tokenizer: Make) -> None:
    turns = (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "b"), ("assistant", "c"))
    text, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer())
    assert text.count("<|assistant|>") == 2
    assert learned == "b<|end|>c<|end|>"


def test_answer_that_looks_like_the_template_does_not_move_the_mask(byte_tokenizer: Make) -> None:
    turns = (("user", "<|assistant|>x<|end|>"), ("assistant", "y <|end|> z"))
    _, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer())
    assert learned == "y <|end|> z<|end|>"


def test_template_that_rewrites_history_learns_what_it_can_locate(byte_tokenizer: Make) -> None:
    """Like templates that drop the reasoning of all turns but the last."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = (("user", "a"), ("assistant", "long"), ("user", "b"), ("assistant", "c"))
    text, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer(template))
    assert text == "<|user|>a<|end|><|assistant|>-<|end|><|user|>b<|end|><|assistant|>c<|end|>"
    assert learned == "c<|end|>"


def test_template_that_refuses_a_record_names_it(byte_tokenizer: Make) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    record = Record((("user", "a"), ("assistant", "b")), False, "d.jsonl", 7)
    with pytest.raises(DataError, match=r"d\.jsonl line 7: .* refuses .*roles must alternate"):
        tokenize([record], byte_tokenizer(template), 512)


def test_without_template_prompt_and_answer_are_joined(byte_tokenizer: Make) -> None:
    text, learned, _ = one(Record.pair("2+2=", "4", "f", 1), byte_tokenizer(None))
    assert (text, learned) == ("2+2=4<|end|>", "4<|end|>")
    turns = (("user", "a"), ("assistant", "b"))
    text, learned, _ = one(Record(turns, False, "f", 1), byte_tokenizer(None))
    assert (text, learned) == ("user: a\nassistant: b<|end|>", "b<|end|>")


def test_token_across_the_border_is_learned_and_counted(byte_tokenizer: Make) -> None:
    """The tokenizer merges "=4"; the whole text's tokens are kept and the merged one is learned."""
    tokenizer = byte_tokenizer(None, merges=(("=", "4"),))
    text, learned, examples = one(Record.pair("2+2=", "42", "f", 1), tokenizer)
    assert (text, learned) == ("2+2=42<|end|>", "=42<|end|>")
    assert examples.merged == 1
    assert "merges the ends" in examples.describe("training", 512)


def test_first_token_is_never_a_target(byte_tokenizer: Make) -> None:
    examples = tokenize([Record.pair("", "ab", "f", 1)], byte_tokenizer(None), 512)
    assert examples.items[0].learned.tolist() == [False, True, True]


def test_cuts_are_counted(byte_tokenizer: Make) -> None:
    tokenizer = byte_tokenizer(None)
    records = [
        Record.pair("12345", "6", "f", 1),  # 7 tokens with the end mark
        Record.pair(
            "12345", "678", "f", 2
        ),  # 9: cut to 8, one answer byte left of three and the mark
        Record.pair("12345678", "9", "f", 3),  # nothing of the answer is left
    ]
    examples = tokenize(records, tokenizer, 8)
    assert [len(item.tokens) for item in examples.items] == [7, 8]
    assert (examples.truncated, examples.dropped, examples.num_learned) == (2, 1, 2 + 3)
    text = examples.describe("training", 8)
    assert "2 cut to 8 tokens" in text
    assert "1 dropped, no answer token left" in text


def test_nothing_to_learn_is_an_error(byte_tokenizer: Make) -> None:
    records = [Record.pair("x" * 30, "y", "t.jsonl", 1), Record.pair("x" * 40, "y", "t.jsonl", 2)]
    with pytest.raises(EmptyTargetError) as caught:
        tokenize(records, byte_tokenizer(None), 16)
    assert "2 of 2 records have no answer token within max_length=16" in str(caught.value)
    assert "shortest prompt: 30 tokens" in str(caught.value)
    assert "First: t.jsonl line 1." in str(caught.value)


def test_collate_pads_on_the_right(byte_tokenizer: Make) -> None:
    tokenizer = byte_tokenizer(None)
    items = tokenize(
        [Record.pair("a", "b", "f", 1), Record.pair("ab", "cd", "f", 2)], tokenizer, 9
    ).items
    batch = collate(items, 99, torch.device("cpu"))
    a, b, c, d = (tokenizer.convert_tokens_to_ids(x) for x in "abcd")
    end = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[a, b, end, 99, 99], [a, b, c, d, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, b, end, no, no], [no, no, c, d, end]]


@pytest.mark.parametrize(("count", "size"), [(40, 4), (41, 4), (3, 8), (1, 1), (200, 3)])
def test_each_epoch_visits_every_record_once(count: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, count).tolist()
    steps = -(-count // size)
    epochs = [
        [step_indices(lengths, size, 5, epoch * steps + step) for step in range(steps)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert Counter(i for step in epoch for i in step) == Counter(range(count))
        assert all(0 < len(step) <= size for step in epoch)
    if count > 8:
        assert epochs[0] != epochs[1] != epochs[2]
        assert step_indices(lengths, size, 6, 0) != epochs[0][0]


def test_pools_spend_little_on_padding() -> None:
    lengths = np.random.default_rng(0).integers(8, 200, 512).tolist()
    padded = used = 0
    for step in range(64):
        chosen = [lengths[i] for i in step_indices(lengths, 8, 0, step)]
        padded += max(chosen) * len(chosen)
        used += sum(chosen)
    assert used / padded > 0.85


@pytest.fixture(scope="session")
def tiny_t5(byte_tokenizer: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random T5 of two layers with a byte tokenizer."""
    directory = tmp_path_factory.mktemp("t5")
    ends = {"pad_token_id": 256, "eos_token_id": 257, "decoder_start_token_id": 256}
    variant("t5", vocab_size=272, **ends).save_pretrained(directory)
    byte_tokenizer(None).save_pretrained(directory)
    return directory


def test_prompt_and_answer_of_an_encoder_decoder(byte_tokenizer: Make) -> None:
    chat = (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    records = [
        Record.pair("what?", "it", "f", 1),
        Record((("user", "q"), ("assistant", "x")), False, "f", 2),
        Record(chat, False, "f", 3),
        Record.pair("", "y", "f", 4),
    ]
    plain, template = byte_tokenizer(None), byte_tokenizer()
    items = tokenize_apart(records, plain, 512).items
    assert [plain.decode(item.source) for item in items] == [
        "what?",
        "q",
        "system: S\nuser: a\nassistant: b\nuser: c",
        "<|end|>",
    ]
    answers = ["it<|end|>", "x<|end|>", "d<|end|>", "y<|end|>"]
    assert [plain.decode(item.tokens) for item in items] == answers
    assert all(item.learned.all() for item in items)
    item = tokenize_apart([records[2]], template, 512).items[0]
    messages = [{"role": role, "content": text} for role, text in chat[:-1]]
    assert template.decode(item.source) == template.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    long = tokenize_apart([Record.pair("1234567", "123456", "f", 1)], plain, 5)
    assert (plain.decode(long.items[0].source), long.truncated) == ("12345", 1)
    assert plain.decode(long.items[0].tokens) == "12345"


def test_mask_without_answers_is_refused_for_an_encoder_decoder(byte_tokenizer: Make) -> None:
    record = Record((("user", "q"), ("assistant", "a")), False, "d.jsonl", 3, ("user",))
    with pytest.raises(DataError, match=r"d\.jsonl line 3: .* learns the last answer"):
        tokenize_apart([record], byte_tokenizer(None), 512)


@pytest.mark.parametrize("method", ["lora", "qlora", "sft", "ia3", "p-tuning", "adapters"])
def test_encoder_decoder_is_trained(make_config: Any, tiny_t5: Path, method: str) -> None:
    config = make_config(model=str(tiny_t5), method=method, steps=8, samples=2)
    config.optimizer.lr = 5e-3
    result = finetune(config)
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    assert len(result.samples) == 2
    if method != "sft":
        about = json.loads((result.weights / "adapter_config.json").read_text())
        assert about["task_type"] == "SEQ_2_SEQ_LM"
    assert finetune(replace(config, resume=True)).eval_loss == result.eval_loss
    given = (
        ["--model", str(result.weights)] if method == "sft" else ["--adapter", str(result.weights)]
    )
    assert main(["generate", *given, "--prompt", "what is 3?", "--max_new_tokens", "8"]) == 0


def test_loss_of_an_encoder_decoder_is_the_models_own(make_config: Any, tiny_t5: Path) -> None:
    """Oracle: transformers' loss on each record alone, weighted by its tokens; accumulated or not."""
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        config = make_config(model=str(tiny_t5), batch_size=size, accumulation=accumulation)
        config.adapter.dropout = 0.0
        place = choose_place(config.run)
        seed_everything(0)
        model, tokenizer = prepare_model(config, place)
        data = load_data(config, tokenizer, encoder_decoder=True)
        parameters = trainable_parameters(model)
        trainer = Trainer(config, place, model, tokenizer, parameters, data, tiny_t5)
        rows = [trainer.step() for _ in range(3)]
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-6)
    reference = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    total = count = 0.0
    for index in step_indices(trainer.lengths, 4, 0, 0):
        record = data.train.items[index].record
        ids, labels = (
            torch.tensor([tokenizer(text)["input_ids"]])
            for text in (record.prompt, record.answer + tokenizer.eos_token)
        )
        with torch.no_grad():
            total += float(reference(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert found[0][0][0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("split_by", ["prompt", "prompt_and_answer"])
def test_evaluation_data_that_are_trained_on_are_told_with_a_fix(
    make_config: Any, data_file: Path, split_by: Any
) -> None:
    """The way to split is named where it is not taken already."""
    options = DatasetOptions(eval_data=str(data_file), split_by=split_by)
    with pytest.raises(DataError, match="also trained on") as caught:
        finetune(make_config(dataset=options))
    fix = str(caught.value).partition("Fix: ")[2]
    expected = ", or --dataset.split_by prompt" if split_by == "prompt_and_answer" else ""
    assert fix == f"other records{expected}"


def test_an_empty_last_answer_is_no_target_of_an_encoder_decoder(byte_tokenizer: Make) -> None:
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", " "))
    found = tokenize_apart([Record(turns, False, "f", 1)], byte_tokenizer(None), 512)
    assert (len(found), found.dropped) == (0, 1)
