from __future__ import annotations

import json

import pytest
import tiny_bundles

from edgeadapt.errors import BundleError, SessionError
from edgeadapt.runtime.tokenizer import open_text_coder


class _Assets:
    """As much of a bundle as a tokenizer needs."""

    def __init__(self, **assets):
        self.files = tiny_bundles.text_assets(chat=False)
        for name, value in assets.items():
            data = value if isinstance(value, str) else json.dumps(value)
            self.files[name.replace("__", ".")] = data.encode()

    @property
    def asset_names(self):
        return tuple(sorted(self.files))

    def asset(self, name):
        if name not in self.files:
            raise BundleError(name, hint="")
        return self.files[name]


def test_truncation_and_padding_of_the_file_are_not_applied():
    coder = open_text_coder(_Assets())
    assert len(coder.encode("a text of twenty-six bytes")) == 26


def test_a_batch_is_padded_on_the_right_with_the_pad_token():
    coder = open_text_coder(_Assets())
    encoded = coder.encode_batch(["abc", "a"])
    assert encoded.arrays["input_ids"][1].tolist() == [*coder.encode("a"), tiny_bundles.PAD, tiny_bundles.PAD]
    assert encoded.arrays["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert encoded.special_mask.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert encoded.truncated == (False, False)
    assert len(coder.encode("still not padded or cut")) == 23


def test_pairs_of_texts():
    encoded = open_text_coder(_Assets()).encode_batch([("ab", "c")])
    assert encoded.arrays["token_type_ids"].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("assets", "limit"),
    [
        ({}, None),
        ({"tokenizer_config__json": {"model_max_length": int(1e30)}}, None),
        ({"tokenizer_config__json": {"model_max_length": 512}}, 512),
        ({"config__json": {"max_position_embeddings": 128}}, 128),
        ({"config__json": {"model_type": "roberta", "max_position_embeddings": 514}}, 512),
        ({"config__json": {"text_config": {"max_position_embeddings": 77}}}, 77),
        ({"config__json": {"n_positions": 1024}}, 1024),
        (
            {
                "tokenizer_config__json": {"model_max_length": 512},
                "sentence_bert_config__json": {"max_seq_length": 256},
            },
            256,
        ),
    ],
)
def test_the_longest_input_is_the_shortest_that_any_file_states(assets, limit):
    coder = open_text_coder(_Assets(**assets))
    assert coder.max_length == limit
    encoded = coder.encode_batch(["x" * 2000, "y"])
    assert encoded.arrays["input_ids"].shape == (2, limit or 2000)
    assert encoded.truncated == (limit is not None, False)


@pytest.mark.parametrize(
    "assets",
    [
        {"tokenizer_config__json": {"chat_template": "{{ bos_token }}!", "bos_token": "<s>"}},
        {"tokenizer_config__json": {"chat_template": [{"name": "default", "template": "<s>!"}]}},
        {"chat_template__jinja": "<s>!", "tokenizer_config__json": {"chat_template": "not this one"}},
        {
            "chat_template__jinja": "{{ bos_token }}!",
            "tokenizer_config__json": {},
            "special_tokens_map__json": {"bos_token": {"content": "<s>"}},
        },
    ],
)
def test_chat_templates_are_found_where_transformers_finds_them(assets):
    coder = open_text_coder(_Assets(**assets))
    ids = coder.encode_chat([{"role": "user", "content": "x"}])
    assert ids == [tiny_bundles.BOS, *coder.encode("!")]


def test_a_json_file_that_is_none_says_so():
    for text, said in (("{", "assets/tokenizer_config.json is not JSON: "), ("[]", "is not a JSON object")):
        with pytest.raises(SessionError, match=said) as caught:
            open_text_coder(_Assets(tokenizer_config__json=text))
        assert caught.value.hint == "check the bundle with `edgeadapt verify`"
