"""The files of a base that travel with a bundle: config, tokenizer, preprocessor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from edgeadapt.errors import BaseModelError
from edgeadapt.files import canonical_json, parse_json, read_bytes
from edgeadapt.merging.quiet import quiet

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SLOW_TOKENIZER_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Where a model was saved or by which version says nothing about it, and quantization is undone when loading.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "quantization_config", "dtype", "torch_dtype")
_LARGEST_BYTES = 256 << 20


def config_asset(config: Any) -> bytes:
    """Return a transformers config as JSON bytes with one spelling."""
    entries = _strip(config.to_diff_dict())
    if "id2label" not in entries and any("Classification" in name for name in config.architectures or ()):
        entries["id2label"] = {str(index): label for index, label in config.id2label.items()}
    return canonical_json(_plain(entries))


def folder_assets(folder: Path, config: Any) -> dict[str, bytes]:
    """Return the asset files of a Hugging Face folder by file name.

    A slow tokenizer is converted to tokenizer.json; sentence-transformers' pooling becomes "pooling.json".

    Raises:
        BaseModelError: if there is a tokenizer that cannot be converted.
    """
    assets = {"config.json": config_asset(config)}
    for name in ("generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            assets[name] = read_bytes(folder / name, max_bytes=_LARGEST_BYTES)
    if (folder / "1_Pooling" / "config.json").is_file():
        assets["pooling.json"] = read_bytes(folder / "1_Pooling" / "config.json", max_bytes=_LARGEST_BYTES)
    if "tokenizer.json" not in assets and any((folder / name).is_file() for name in _SLOW_TOKENIZER_FILES):
        assets |= _converted_tokenizer(folder)
    for name in assets:
        if name.endswith(".json"):
            parse_json(assets[name], f"{folder / name}", BaseModelError)
    return assets


def saved_tokenizer(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that a fast transformers tokenizer saves, by file name."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        tokenizer.save_pretrained(scratch)
        saved = {name: Path(scratch) / name for name in TOKENIZER_FILES}
        return {name: path.read_bytes() for name, path in saved.items() if path.is_file()}


def _converted_tokenizer(folder: Path) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no fast form")  # noqa: TRY301 - one handler for both
    except Exception as error:  # each tokenizer's converter has its own ways to fail
        raise BaseModelError(
            f"{folder} has no tokenizer.json, and its tokenizer cannot be converted to one: {_first_line(error)}",
            hint="`pip install sentencepiece tiktoken` and try again, or put the model's tokenizer.json there",
        ) from error
    return saved_tokenizer(tokenizer)


def _strip(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _strip(value) if isinstance(value, dict) else value
        for key, value in entries.items()
        if key not in _NOT_OF_THE_MODEL
    }


def _plain(value: Any) -> Any:
    """Return JSON values only; a config may hold tuples, sets or integer keys."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
