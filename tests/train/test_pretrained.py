# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a name that is wrong is told at once, in a sentence with a fix."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pyfast.errors import ConfigError
from pyfast.train import pretrained
from pyfast.train.pretrained import load_pretrained
from tests.models import VOCAB, gpt2, llama, logits


def load(source: str) -> Any:
    return load_pretrained(source, torch.float32, torch.device("cpu"))


def refusal(source: str) -> str:
    """The error of a load that must take less than two seconds."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert time.monotonic() - start < 2
    text = str(caught.value)
    assert text.count("\n") == 0
    assert "Fix: " in text
    return text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such", "neither a directory here nor a name on the Hugging Face hub (OWNER/NAME)"),
        ("./model", "neither a directory here"),
        ("a/b/c", "neither a directory here"),
        ("spaced name", "neither a directory here"),
        ("{file}", "neither a directory here"),
        ("{empty}", "it has no config.json. Fix: the path of a model directory"),
        ("{adapter}", "It is an adapter. Fix: --adapter {adapter}"),
        ("no/such", "the Hugging Face hub cannot be asked (Cannot reach https://"),  # offline here
    ],
)
def test_what_is_no_model_is_told_by_its_form(tmp_path: Path, name: str, reason: str) -> None:
    places = {"file": tmp_path / "file", "empty": tmp_path / "e", "adapter": tmp_path / "a"}
    places["file"].write_text("")
    places["empty"].mkdir()
    places["adapter"].mkdir()
    (places["adapter"] / "adapter_config.json").write_text("{}")
    assert reason.format(**places) in refusal(name.format(**places))


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status that the model's name ends with."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(int(self.path[-3:]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine; the requests that it got."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(_Hub, "asked", [])
    yield _Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_model_that_the_hub_has_not(hub: list[str], status: int) -> None:
    text = refusal(f"no/such-{status}")
    assert f"has none of this name that is open to you (HTTP {status})" in text
    assert len(hub) == 1


def test_hub_in_trouble_is_asked_once(hub: list[str]) -> None:
    assert "the Hugging Face hub cannot be asked" in refusal("no/such-503")
    assert len(hub) == 1


def test_hub_that_never_answers(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        assert "the Hugging Face hub cannot be asked" in refusal("no/such")


def test_hub_that_is_not_there(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hugging Face hub cannot be asked" in refusal("no/such")


def test_cached_model_trains_without_hub_and_peers(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    """Where nothing answers, and offline; neither PEFT nor bitsandbytes is imported."""
    root = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(tiny_model, root / "snapshots" / "0123")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123")
    script = (
        "import sys, huggingface_hub.constants\n"
        "from pyfast.cli import main\n"
        "run = ['--run.steps', '1', '--run.samples', '0', '--dataset.eval_fraction', '0']\n"
        "for offline, method in ((False, 'lora'), (True, 'qlora')):\n"
        "    huggingface_hub.constants.HF_HUB_OFFLINE = offline\n"
        "    arguments = ['--method', method, '--output_dir', f'{sys.argv[2]}/{method}', *run]\n"
        "    assert main(['finetune', '--model', 'me/tiny', '--data', sys.argv[1], *arguments]) == 0\n"
        "assert not {'bitsandbytes', 'peft'} & set(sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, data_file, tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    config = json.loads((tmp_path / "out" / "lora" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/tiny"


def changed(source: Path, target: Path, drop: str = "", add: str = "", **config: Any) -> str:
    """A copy of a model without the weights that begin with `drop`, with others, and another config."""
    shutil.copytree(source, target)
    if drop or add:
        tensors = load_file(target / "model.safetensors")
        kept = {n: tensor for n, tensor in tensors.items() if not drop or not n.startswith(drop)}
        kept |= {name: torch.zeros(2) for name in add.split()}
        save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return str(target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"drop": "model.layers.1."},
            r"lacks 9 weights .*\(first: model\.layers\.1\.input_layernorm",
        ),
        ({"drop": "lm_head"}, r"lacks 1 weights of LlamaForCausalLM \(first: lm_head\.weight\)"),
        (
            {"hidden_size": 48},
            r"21 weights .* have other shapes .*lm_head\.weight, \[272, 32\] for",
        ),
        ({"vocab_size": 300}, r"\[272, 32\] for \[300, 32\]\)\. Fix: the config\.json"),
        (
            {"num_hidden_layers": 1},
            r"holds 9 weights more than its config\.json asks for \(first: model\.layers\.1\.input_layern",
        ),
        ({"add": "model.layers.0.self_attn.q_proj.bias"}, r"holds 1 weights more .*q_proj\.bias\)"),
        (
            {"add": "lm_head.bias"},
            r"holds 1 weights more .*\(first: lm_head\.bias\)\. Fix: the conf",
        ),
        ({"num_attention_heads": 0}, "cannot load the model .*modulo by zero"),
        ({"hidden_size": "x"}, "'hidden_size': .*expected int, got str"),
    ],
    ids=str,
)
def test_model_that_is_not_whole_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load(changed(tiny_model, tmp_path / "changed", **changes))
    assert "\n" not in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path: Path, byte_tokenizer: Any) -> None:
    gpt2().transformer.save_pretrained(tmp_path)  # without a head, which is the embeddings'
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load(str(tmp_path))
    assert torch.equal(logits(model), logits(gpt2()))


ATTENTION = "transformer.h.0.attn.attention"


def gpt_neo() -> Any:
    """A GPT-Neo whose class names none of the constants that its older files hold."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    kinds = {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
    torch.manual_seed(0)
    return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes, **kinds)).eval()


def llama_with_equal_ends() -> Any:
    model = llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    return model


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (llama, {"add": "model.layers.0.self_attn.rotary_emb.inv_freq model.rotary_emb.inv_freq"}),
        (
            llama,
            {"add": "v_head.summary.weight model.visual.patch.weight mtp.layers.0.norm.weight"},
        ),
        (llama_with_equal_ends, {"tie_word_embeddings": True}),
        (gpt2, {"add": "transformer.h.0.attn.bias transformer.h.0.attn.masked_bias"}),
        (gpt_neo, {"add": f"{ATTENTION}.bias {ATTENTION}.masked_bias"}),
    ],
)
def test_tensors_that_change_no_output_are_passed_over(
    tmp_path: Path, byte_tokenizer: Any, make: Any, changes: dict[str, Any]
) -> None:
    """Constants of older files, parts that the class does not have, a tied weight stored twice."""
    model = make()
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    loaded, _ = load(changed(tmp_path / "m", tmp_path / "more", **changes))
    assert torch.equal(logits(loaded), logits(model))


def test_layers_beyond_the_last_one_of_a_bare_base_model(
    tmp_path: Path, byte_tokenizer: Any
) -> None:
    gpt2().transformer.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"holds 11 weights more .*\(first: h\.1\."):
        load(changed(tmp_path / "m", tmp_path / "short", n_layer=1))


def test_damaged_weights_are_told(tiny_model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"cannot load the model '.*damaged': .*header"):
        load(str(damaged))
