# SPDX-License-Identifier: Apache-2.0
"""P-tuning and what a model is called with: generation, caches, padding, packing, decoders, refusals."""

import peft
import pytest
import torch
import transformers
from torch import nn

import pyfast
from pyfast.errors import AdapterStateError, ConfigError, UnsupportedError
from tests.family_models import VARIANTS, batch, outputs, variant
from tests.methods.test_p_tuning import V, cache_name, config, pefts, prompted
from tests.models import llama, logits, token_ids

pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning",
)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rw", "gemma2", "t5"])
def test_generation_takes_what_pefts_forward_says(name):
    """Not its `generate`, which puts virtual tokens in at every step of transformers' new caches."""
    ours = prompted(variant(name, use_cache=True))
    theirs = pefts(ours, variant(name, use_cache=False))
    two, ids = ours.config.is_encoder_decoder, token_ids()
    expected = torch.zeros(2, 1, dtype=torch.long) if two else ids
    for _ in range(6):
        inputs = (
            {"input_ids": ids, "decoder_input_ids": expected} if two else {"input_ids": expected}
        )
        with torch.no_grad():
            step = theirs(**inputs).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, step], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"eos_token_id": None}
    assert torch.equal(ours.generate(input_ids=ids, **options), expected)
    beams = ours.generate(input_ids=ids, num_beams=3, **options)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("name", [n for n in VARIANTS if not n.startswith("t5")])
def test_generation_with_and_without_cache_is_the_plain_argmax(name):
    model = prompted(variant(name, use_cache=True))
    ids = token_ids()
    expected = ids
    for _ in range(6):
        with torch.no_grad():
            step = model(input_ids=expected, use_cache=False).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, step], dim=1)
    for use_cache in (True, False):
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
        )
        assert torch.equal(found, expected), use_cache


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rw", "gemma2", "mistral", "gemma3"])
def test_left_padding_changes_nothing(name):
    model = prompted(variant(name, use_cache=True))
    short = token_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    mask = (torch.arange(10) >= 4).long()[None]
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)[:, 6:]
    beside = model.generate(padded, attention_mask=mask, **options)[:, 10:]
    assert torch.equal(alone, beside)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        row = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(row, logits(model, short), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "qwen3", "starcoder2"])
def test_packed_samples_each_have_their_virtual_tokens(name):
    model = prompted(variant(name))
    samples = [token_ids(1, size, seed=size) for size in (7, 1, 4)]
    ids = torch.cat(samples, dim=1)
    positions = torch.cat([torch.arange(s.shape[1]) for s in samples])[None]
    labels = torch.cat([torch.cat([s[:, :1] * 0 - 100, s[:, 1:]], 1) for s in samples], dim=1)
    out = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
    expected = torch.cat([logits(model, sample) for sample in samples], dim=1)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-4)
    sums = [
        nn.functional.cross_entropy(
            logits(model, s)[0, :-1], s[0, 1:], reduction="sum"
        ) for s in samples if s.shape[1] > 1
    ]  # fmt: skip
    assert out.loss.item() == pytest.approx(float(sum(sums)) / 9, rel=1e-5)
    for keep, rows in ((torch.tensor([2, 7, 8]), [2, 7, 8]), (5, range(7, 12))):
        part = model(
            input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits
        torch.testing.assert_close(part, expected[:, list(rows)], atol=1e-5, rtol=1e-4)


def test_forms_of_arguments():
    model = prompted(llama())
    ids, expected = token_ids(), None
    expected = logits(model, ids)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        forms = [
            model(ids).logits,
            model(ids, torch.ones_like(ids)).logits,
            model(inputs_embeds=embeds).logits,
            model(input_ids=ids, position_ids=torch.arange(12)[None]).logits,
            model(input_ids=ids, return_dict=False)[0],
            model(input_ids=ids, labels=ids, return_dict=False)[1],
            model.model(ids).last_hidden_state,
        ]
        for found in forms[:-1]:
            torch.testing.assert_close(found, expected)
        assert torch.equal(forms[-1], llama().model(ids).last_hidden_state)
        for keep in (3, 12, 40, torch.tensor([0, 5, 11])):
            rows = keep if isinstance(keep, torch.Tensor) else slice(-min(keep, 12), None)
            part = model(input_ids=ids, logits_to_keep=keep).logits
            torch.testing.assert_close(part, expected[:, rows])
        out = model(input_ids=ids, output_hidden_states=True)
        assert out.hidden_states[0].shape[1] == 12 + V
        # A loop of one's own over the cache, that counts its own tokens.
        cache = transformers.DynamicCache(config=model.config)
        name = cache_name(model)
        model(input_ids=ids[:, :8], use_cache=True, **{name: cache})
        rest = model(
            input_ids=ids[:, 8:],
            **{name: cache},
            attention_mask=torch.ones(2, 12, dtype=torch.long),
            position_ids=torch.arange(8, 12)[None],
        )
        torch.testing.assert_close(rest.logits, expected[:, 8:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_virtual_tokens_of_a_decoder(name, tmp_path):
    """The base with embeddings put in front of both inputs by hand."""
    model = prompted(variant(name, use_cache=True), decoder_prompt=True)
    table = model.prompt_encoder.embeddings("default").detach()
    assert table.shape == (2 * V, 64)
    base, inputs = variant(name), batch(model)
    starts = torch.cat([torch.zeros(2, 1, dtype=torch.long), inputs["labels"][:, :-1]], dim=1)

    def by_hand(decoder_ids):
        words = base.get_input_embeddings()
        put = [torch.cat([part.expand(2, -1, -1), words(ids)], dim=1) for part, ids in (
            (table[:V], inputs["input_ids"]), (table[V:], decoder_ids))]  # fmt: skip
        with torch.no_grad():
            return base(inputs_embeds=put[0], decoder_inputs_embeds=put[1]).logits[:, V:]

    expected = by_hand(starts)
    out = model(**inputs)
    torch.testing.assert_close(out.logits, expected)
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), inputs["labels"].flatten())
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    out.loss.backward()
    grad = model.prompt_encoder.default.embedding.weight.grad
    assert (grad.abs().sum(1) > 0).all()
    made = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(6):
        made = torch.cat([made, by_hand(made)[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        found = model.generate(inputs["input_ids"], use_cache=use_cache, **options)
        assert torch.equal(found, made)
    pyfast.save_adapter(model, tmp_path)
    for trainable in (True, False):
        again = pyfast.load_adapter(variant(name), tmp_path, trainable=trainable)
        torch.testing.assert_close(outputs(again), expected)
    theirs = peft.PeftModel.from_pretrained(variant(name), tmp_path)  # the encoder's alone
    assert theirs(**inputs).logits.shape == expected.shape
    pyfast.delete_adapter(model, "default")
    assert torch.equal(outputs(model), outputs(variant(name)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ConfigError, match="needs an encoder and a decoder"):
        pyfast.apply(llama(), config(decoder_prompt=True))


def test_what_cannot_be_served_is_refused():
    model = prompted(llama())
    ids = token_ids()
    mask4 = torch.ones(2, 1, 12, 12)
    for arguments, text in (
        ({"attention_mask": mask4}, r"must be \[batch, tokens\], got \[2, 1, 12, 12\]"),
        ({"token_type_ids": ids}, "token_type_ids is not served"),
        ({"position_ids": ids[None]}, "position_ids must be"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            model(input_ids=ids, **arguments)
    with pytest.raises(UnsupportedError, match="cache_implementation='dynamic'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    cache = transformers.DynamicCache(config=model.config)
    past = {cache_name(model): cache}
    model(input_ids=ids, use_cache=True, **past)
    with pytest.raises(UnsupportedError, match="cache of an earlier call"):
        model(input_ids=ids, attention_mask=torch.ones(2, 20), **past)
    with pytest.raises(AdapterStateError, match="taken by an attribute"):
        pyfast.apply(model, config(), adapter_name="lengths")
    with pytest.raises(UnsupportedError, match="takes inputs_embeds"):
        pyfast.apply(nn.Sequential(nn.Linear(2, 2)), config())
