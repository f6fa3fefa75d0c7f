"""Text to token ids and back, with the bundle's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgeadapt.bundle.bundle import Bundle
from edgeadapt.errors import SessionError
from edgeadapt.runtime.chat import Message, render_chat

_VERIFY = "check the bundle with `edgeadapt verify`"
_UNLIMITED = 1_000_000
"""transformers writes a model_max_length of about 1e30 where there is none."""
_HOLES = "�"


@dataclass(frozen=True)
class EncodedText:
    """Texts as a right-padded batch.

    arrays: `input_ids`, `attention_mask`, `token_type_ids`, int64[batch, seq] each
    offsets: (start, end) in the text of every token, by row; special_mask: int64[batch, seq], 1 at special tokens
    truncated: whether each row was cut to the model's longest input
    """

    arrays: Mapping[str, NDArray[np.int64]]
    offsets: tuple[tuple[tuple[int, int], ...], ...]
    special_mask: NDArray[np.int64]
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class TextCoder:
    """A tokenizer without truncation or padding of its own.

    chat_template: jinja text, or None; special_tokens: by role ("bos_token"), for the chat template
    max_length: the longest input in tokens, or None; pad_id, pad_token: for batches
    """

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    max_length: int | None
    pad_id: int
    pad_token: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with the tokenizer's special tokens around it if asked for."""
        return list(self.tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's answer.

        Raises:
            SessionError: if the bundle has no chat template or it refuses the messages.
        """
        if self.chat_template is None:
            raise SessionError(
                "this bundle has no chat template, so it cannot take chat messages",
                hint="give the prompt as plain text",
            )
        # The template writes the special tokens itself.
        return self.encode(render_chat(self.chat_template, messages, self.special_tokens), special_tokens=False)

    def encode_batch(self, texts: Sequence[str | tuple[str, str]], *, truncate: bool = True) -> EncodedText:
        """Return texts (or pairs of texts) as one right-padded batch, cut to `max_length` if `truncate`."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        if truncate and self.max_length is not None:
            tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=self.pad_token)
        found = tokenizer.encode_batch(list(texts))
        arrays = {
            "input_ids": np.asarray([item.ids for item in found], np.int64),
            "attention_mask": np.asarray([item.attention_mask for item in found], np.int64),
            "token_type_ids": np.asarray([item.type_ids for item in found], np.int64),
        }
        return EncodedText(
            arrays=arrays,
            offsets=tuple(tuple(item.offsets) for item in found),
            special_mask=np.asarray([item.special_tokens_mask for item in found], np.int64),
            truncated=tuple(bool(item.overflowing) for item in found),
        )


class Detokenizer:
    """Turns a stream of token ids into text without ever giving half a character.

    Bytes of one character may lie in several tokens, and some decoders write a token differently at the start of a
    text, so each token is decoded together with the ones before it.
    """

    def __init__(self, coder: TextCoder) -> None:
        self._coder = coder
        self._ids: list[int] = []
        self._from = 0
        self._done = 0
        self._before = ""

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, "" if its last character is not complete yet."""
        self._ids.append(token_id)
        text = self._coder.decode(self._ids[self._from :])
        if text.endswith(_HOLES) or not text.startswith(self._before):
            return ""
        return self._take(text)

    def finish(self) -> str:
        """Return what is left; bytes that never became a character come out as U+FFFD."""
        return self._take(self._coder.decode(self._ids[self._from :]))

    def _take(self, text: str) -> str:
        piece = text[len(self._before) :]
        if self._done < len(self._ids) and piece:
            self._from, self._done = self._done, len(self._ids)
            self._before = self._coder.decode(self._ids[self._from :])
        return piece


def open_text_coder(bundle: Bundle) -> TextCoder:
    """Return the bundle's tokenizer and chat template.

    Raises:
        SessionError: if there is no tokenizer.json, or it cannot be read.
    """
    if "tokenizer.json" not in bundle.asset_names:
        raise SessionError(
            f"bundle {bundle.manifest.name!r} holds no assets/tokenizer.json",
            hint="give token ids or arrays instead of text, or export the bundle again with its tokenizer",
        )
    try:
        tokenizer = Tokenizer.from_buffer(bundle.asset("tokenizer.json"))
    except ValueError as error:
        raise SessionError(f"assets/tokenizer.json could not be read: {error}", hint=_VERIFY) from error
    config = read_json_asset(bundle, "tokenizer_config.json")
    special = special_tokens_of(config, read_json_asset(bundle, "special_tokens_map.json"))
    # What tokenizer.json says about these is left over from its training and would silently cut or pad a prompt.
    tokenizer.no_truncation()
    padding = tokenizer.padding
    tokenizer.no_padding()
    pad_token = special.get("pad_token") or (padding or {}).get("pad_token") or special.get("eos_token") or ""
    pad_id = tokenizer.token_to_id(pad_token)
    return TextCoder(
        tokenizer=tokenizer,
        chat_template=_chat_template(bundle, config),
        special_tokens=special,
        max_length=_max_length(bundle, config),
        pad_id=0 if pad_id is None else int(pad_id),
        pad_token=pad_token,
    )


def read_json_asset(bundle: Bundle, name: str) -> dict[str, Any]:
    """Return a JSON file of the bundle's assets, {} if it is not there.

    Raises:
        SessionError: if it is not a JSON object.
    """
    if name not in bundle.asset_names:
        return {}
    try:
        value = json.loads(bundle.asset(name))
    except ValueError as error:
        raise SessionError(f"assets/{name} is not JSON: {error}", hint=_VERIFY) from error
    if not isinstance(value, dict):
        raise SessionError(f"assets/{name} is not a JSON object", hint=_VERIFY)
    return value


def special_tokens_of(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens' texts by role ("bos_token"); the tokenizer's config decides over the older map."""
    found = {}
    for source in (special_map, config):
        for role, value in source.items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if role.endswith("_token") and isinstance(text, str):
                found[role] = text
    return found


def _chat_template(bundle: Bundle, config: Mapping[str, Any]) -> str | None:
    """Return the template as transformers finds it: chat_template.jinja, else the tokenizer's config."""
    if "chat_template.jinja" in bundle.asset_names:
        return bundle.asset("chat_template.jinja").decode("utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _max_length(bundle: Bundle, config: Mapping[str, Any]) -> int | None:
    """Return the shortest limit that any of the model's files states."""
    model = read_json_asset(bundle, "config.json")
    # sentence-transformers' own limit is the one its embeddings were trained with
    sentence = read_json_asset(bundle, "sentence_bert_config.json").get("max_seq_length")
    positions = model.get("max_position_embeddings") or model.get("n_positions")
    text_config = model.get("text_config")
    if isinstance(text_config, Mapping):
        positions = positions or text_config.get("max_position_embeddings")
    if isinstance(positions, int) and model.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # their positions begin after the padding index
    stated = [
        value for value in (config.get("model_max_length"), positions, sentence) if isinstance(value, int | float)
    ]
    limits = [int(value) for value in stated if 0 < value < _UNLIMITED]
    return min(limits) if limits else None
