"""Prompts to token ids, and how much may be written after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime.chat import Message
from edgeadapt.runtime.tokenizer import TextCoder

Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]
"""A text, token ids, chat messages, or the inputs of an encoder by name."""


def prompt_ids(coder: TextCoder, prompt: Prompt, chat: bool | None) -> list[int]:
    """Return a prompt's token ids.

    Args:
        coder: the bundle's tokenizer.
        prompt: a text, token ids, or chat messages.
        chat: for a text: True wraps it as a user's message, False takes it raw, None wraps it if there is a template.

    Raises:
        SessionError: if the prompt is none of these, or empty.
    """
    if isinstance(prompt, str):
        wrap = coder.chat_template is not None if chat is None else chat
        ids = coder.encode_chat([{"role": "user", "content": prompt}]) if wrap else coder.encode(prompt)
    elif isinstance(prompt, Sequence | np.ndarray) and len(prompt) and isinstance(prompt[0], Mapping):
        ids = coder.encode_chat([item for item in prompt if isinstance(item, Mapping)])
    elif isinstance(prompt, Sequence | np.ndarray) and all(isinstance(item, int | np.integer) for item in prompt):
        ids = np.asarray(prompt, np.int64).tolist()
    else:
        raise SessionError(
            f"a prompt is {type(prompt).__name__}", hint="give a text, a list of token ids, or a list of chat messages"
        )
    if not ids:
        raise SessionError("the prompt is empty", hint="give at least one token")
    return ids


def answer_limit(max_length: int, prompt_tokens: int, max_new_tokens: int, *, what: str = "model") -> int:
    """Return how many tokens may be written after a prompt.

    Raises:
        SessionError: if not even one fits; `what` names what holds at most `max_length` tokens.
    """
    room = max_length - prompt_tokens
    if room < 1:
        raise SessionError(
            f"the prompt has {prompt_tokens} tokens; this {what} holds at most {max_length} with its answer",
            hint="shorten the prompt",
        )
    return min(max_new_tokens, room)


def check_vocabulary(ids: Sequence[int], spec: DecoderSpec) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        SessionError: naming the first of them.
    """
    for token in ids:
        if not 0 <= token < spec.vocab_size:
            raise SessionError(
                f"the prompt holds the token id {token}; the vocabulary has {spec.vocab_size} tokens",
                hint="encode the text with the bundle's own tokenizer",
            )
