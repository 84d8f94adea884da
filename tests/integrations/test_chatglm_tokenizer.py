# SPDX-License-Identifier: Apache-2.0
"""ChatGLM's sentencepiece tokenizer, against sentencepiece, and `pyfast convert` of a whole checkpoint."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyfast.cli import main
from pyfast.errors import ConfigError, UnsupportedError
from tests.integrations.chatglm import ids, original
from tests.models import logits

sentencepiece = pytest.importorskip("sentencepiece")


TEXTS = [
    "Hello, world!",
    "  two  spaces and\na line\n\n",
    "sop eop people sop",
    "\u4f60\u597d,\u4e16\u754c",
    "\U0001f600 caf\u00e9 \u2581 x",
    "",
    " ",
    "def f(x):\n    return x ** 2\t# 100",
]
CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"]
CONTROL += ["<|assistant|>", "<|observation|>"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer.model of byte-pair pieces with byte fallback, in which `eop` and `sop` are pieces."""
    directory = tmp_path_factory.mktemp("pieces")
    words = ["hello world people sop eop soppy return def the model of a language line two spaces"]
    (directory / "text").write_text("\n".join(words * 20 + TEXTS[:3] + ["xsop xeop"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


@pytest.fixture
def source(pieces, tmp_path):
    directory = tmp_path / "source"
    original(directory)
    shutil.copy(pieces, directory / "tokenizer.model")
    declared = {
        "tokenizer_class": "ChatGLMTokenizer",
        "remove_space": False,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "chat_template": "{% for m in messages %}{% if loop.first %}[gMASK]sop{% endif %}"
        "<|{{ m['role'] }}|>\n {{ m['content'] }}{% endfor %}<|assistant|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(declared))
    return directory


def test_tokens_are_those_of_sentencepiece_after_the_prefix(source):
    processor = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    size = processor.get_piece_size()
    assert {"eop", "sop"} <= {processor.id_to_piece(i) for i in range(size)}
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.convert_tokens_to_ids(CONTROL) == list(range(size, size + 9))
    gmask, sop = size + 1, size + 3
    for text in TEXTS:
        assert tokenizer(text).input_ids == [gmask, sop, *processor.encode(text)], text
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))
    pair = tokenizer("Hello", "world").input_ids
    assert pair == [gmask, sop, *processor.encode("Hello"), *processor.encode("world"), 2]
    batch = tokenizer(["Hello", "Hello, world!"], padding=True)
    assert batch.input_ids[0][0] == tokenizer.pad_token_id == 0
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_dict=True)
    inner = processor.encode("\n") + processor.encode("Hello")
    assert chat["input_ids"] == [gmask, sop, size + 6, *inner, size + 7]
    assert AutoTokenizer.from_pretrained(source, padding_side="right").padding_side == "right"


def test_tokenizers_that_cannot_be_read(source):
    (source / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UnsupportedError, match="no sentencepiece model"):
        AutoTokenizer.from_pretrained(source)
    (source / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.model"):
        AutoTokenizer.from_pretrained(source)


def test_convert_writes_what_transformers_alone_loads(source, tmp_path, capsys):
    target = tmp_path / "glm"
    assert main(["convert", "--source", str(source), "--output", str(target), "--dtype=fp32"]) == 0
    capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(source)
    assert load_file(target / "model.safetensors").keys() == model.state_dict().keys()
    expected = AutoTokenizer.from_pretrained(source)(TEXTS).input_ids
    torch.save([logits(model, ids()), expected], tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers as t; d = sys.argv[1] + '/glm'\n"
        "logits, tokens = torch.load(sys.argv[1] + '/expected.pt')\n"
        "m, k = t.AutoModelForCausalLM.from_pretrained(d), t.AutoTokenizer.from_pretrained(d)\n"
        "assert 'pyfast' not in sys.modules\n"
        f"assert k({TEXTS!r}).input_ids == tokens\n"
        "assert k.padding_side == 'left' and k.eos_token_id == 2\n"
        "x = torch.randint(3, 640, (2, 24), generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad(): assert torch.equal(m(input_ids=x).logits, logits)\n"
        "m.generate(**k(['Hello', 'two spaces'], return_tensors='pt', padding=True), max_new_tokens=2)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_convert_does_not_open_pickles(source, tmp_path, capsys):
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert main(["convert", "--source", str(source), "--output", str(tmp_path / "glm")]) == 2
    assert "UnsafeFileError" in capsys.readouterr().err
    assert not (tmp_path / "glm").exists()
