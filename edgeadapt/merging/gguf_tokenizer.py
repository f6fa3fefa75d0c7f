"""A GGUF file's tokenizer as tokenizer.json, from the file's own description.

transformers' import guesses the splitting of words from the architecture, so it loses the split of digits and adds a
BOS. The file says which splitting it was made for (`tokenizer.ggml.pre`); what each name means is fixed in llama.cpp's
src/llama-vocab.cpp and in the tokenizer.json of the models that it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeadapt.errors import BaseModelError

_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> Any:
    """Return a fast transformers tokenizer.

    Args:
        metadata: the file's `tokenizer.*` entries and `context_length`.
        where: the file, for messages.

    Raises:
        BaseModelError: if the file's kind of tokenizer or its splitting of words is not known, or parts are missing.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise BaseModelError(
            f"{where}: its tokenizer is of the kind {model!r}, of which no tokenizer.json can be made",
            hint='only byte-level BPE ("gpt2") is read from GGUF; give the Hugging Face folder of this model',
        )
    if pre not in _SPLITTERS:
        raise BaseModelError(
            f"{where}: its tokenizer splits words in the way {pre!r}, which is not known",
            hint=f"known: {', '.join(sorted(_SPLITTERS))}; give the Hugging Face folder of this model",
        )
    tokens, merges, types = _vocabulary(metadata, where)
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in _WHOLE_WORDS,
        )
    )
    _SPLITTERS[pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        texts = [token for token, token_kind in zip(tokens, types, strict=True) if token_kind == kind]
        added = [AddedToken(text, normalized=False, special=special) for text in texts]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    _add_ends(tokenizer, tokens, metadata, pre)
    named = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in _NAMED_TOKENS.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _vocabulary(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[str], list[int]]:
    missing = [key for key in ("tokens", "merges", "token_type") if f"tokenizer.ggml.{key}" not in metadata]
    if missing:
        raise BaseModelError(
            f"{where}: tokenizer.ggml.{missing[0]} is missing", hint="the file is incomplete; download it again"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise BaseModelError(
            f"{where}: {len(tokens)} tokens, of which {len(set(tokens))} differ, have {len(types)} types",
            hint="the file is damaged; download it again",
        )
    ids = {key: value for key, value in metadata.items() if key.endswith("_token_id")}
    for key, value in ids.items():
        if not 0 <= value < len(tokens):
            raise BaseModelError(
                f"{where}: {key} is {value}, but there are {len(tokens)} tokens",
                hint="the file is damaged; download it again",
            )
    return tokens, metadata["tokenizer.ggml.merges"], types


def _add_ends(tokenizer: Any, tokens: list[str], metadata: Mapping[str, Any], pre: str) -> None:
    """Put BOS before and EOS behind a text where the file says so; llama-bpe has a BOS unless it says otherwise."""
    from tokenizers import processors

    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_WORDS),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ends = {
        end: (tokens[metadata[f"tokenizer.ggml.{end}_token_id"]], metadata[f"tokenizer.ggml.{end}_token_id"])
        for end, add in wanted.items()
        if add and f"tokenizer.ggml.{end}_token_id" in metadata
    }
    if not ends:
        return
    before, behind = ([ends[end][0]] if end in ends else [] for end in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in behind)],
        special_tokens=list(dict.fromkeys(ends.values())),
    )


def _plain_words(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


def _single_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def _words_by(pattern: str, *, composed: bool) -> Callable[[Any], None]:
    def split(tokenizer: Any) -> None:
        from tokenizers import Regex, normalizers, pre_tokenizers

        if composed:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
            ]
        )

    return split


_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3"})  # a word that is a token stays whole
_SPLITTERS: dict[str, Callable[[Any], None]] = {
    "gpt-2": _plain_words,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "qwen2": _words_by(_QWEN2_WORDS, composed=True),
    **dict.fromkeys(_WHOLE_WORDS, _words_by(_LLAMA3_WORDS, composed=False)),
}
