# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens take positions of a learned table: refused where none is left, before torch's IndexError."""

import pytest
import torch
import transformers

import pyfast
from pyfast import PromptEncoderConfig
from pyfast.errors import ConfigError, UnsupportedError
from pyfast.nn.prompt import position_rows
from tests.models import gpt2, llama

ROWS = 64  # of the small GPT-2


def ids(count, rows=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 60, (rows, count), generator=generator)


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 100}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 20}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **heads, **ffn)
    )


@pytest.mark.parametrize("count", [ROWS, 200])
def test_apply_refuses_a_prompt_that_leaves_no_position(count):
    model = gpt2()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=f"num_virtual_tokens={count} leaves no position .* has 64"
    ) as caught:
        pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=count))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    model(input_ids=ids(ROWS))
    fix = int(str(caught.value).rpartition("num_virtual_tokens=")[2])
    pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=fix))
    model(input_ids=ids(ROWS - fix))


def test_a_rotary_model_has_no_such_limit():
    """Nor is its prompt's own table taken for one."""
    model = llama(max_position_embeddings=32)
    pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=32))
    assert position_rows(model) is None
    model(input_ids=ids(40))


def test_forward_beyond_the_positions_is_told_in_a_sentence():
    model = gpt2().eval()
    pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=20))
    last = model(input_ids=ids(44)).logits
    assert last.shape[1] == 44
    for given in ({"input_ids": ids(45)}, {"inputs_embeds": torch.zeros(1, 45, 64)}):
        with pytest.raises(UnsupportedError) as caught:
            model(**given)
        assert str(caught.value) == (
            "[PF016] P-tuning: 45 tokens and 20 virtual ones in front of them are 65, but GPT2LMHeadModel "
            "has 64 positions. Fix: at most 44 tokens"
        )
    assert torch.equal(model(input_ids=ids(44)).logits, last)
    with pyfast.adapters_disabled(model):
        model(input_ids=ids(64))


def test_positions_that_are_given_count_and_not_places():
    """Samples that are packed into one row share the table, and padding has no position of its own."""
    model = gpt2().eval()
    pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=20))
    packed = torch.arange(40).repeat(2)[None]
    assert model(input_ids=ids(80), position_ids=packed).logits.shape[1] == 80
    with pytest.raises(UnsupportedError, match="P-tuning: 45 tokens and 20 virtual ones"):
        model(input_ids=ids(90), position_ids=torch.arange(45).repeat(2)[None])
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :20], mask[1, :10] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(input_ids=ids(50, 2), attention_mask=mask, position_ids=positions)


def test_generation_beyond_the_positions():
    model = gpt2().eval()
    pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=20))
    prompt = ids(40)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    assert model.generate(prompt, max_new_tokens=5, **options).shape[1] == 45
    with pytest.raises(UnsupportedError, match="45 tokens and 20 virtual ones"):
        model.generate(prompt, max_new_tokens=6, **options)


def test_an_encoder_decoder_has_them_in_both_parts():
    model = bart().eval()
    with pytest.raises(ConfigError, match="leaves no position"):
        pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=20))
    pyfast.apply(model, PromptEncoderConfig(num_virtual_tokens=8, decoder_prompt=True))
    start = torch.zeros(1, 1, dtype=torch.long)
    model(input_ids=ids(12), decoder_input_ids=start)
    with pytest.raises(
        UnsupportedError, match=r"13 tokens and 8 virtual ones .* BartEncoder has 20"
    ):
        model(input_ids=ids(13), decoder_input_ids=start)
    with pytest.raises(
        UnsupportedError, match=r"13 tokens and 8 virtual ones .* BartDecoder has 20"
    ):
        model(input_ids=ids(3), decoder_input_ids=start.expand(1, 13))
