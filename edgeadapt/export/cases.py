"""Inputs on which an export is compared with the original: several lengths and batch sizes, and the user's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.errors import ExportError
from edgeadapt.export.export import task_of
from edgeadapt.export.tasks import single_pass
from edgeadapt.merging.base_model import BaseModel

Case = dict[str, torch.Tensor]
SEED = 0
DECODER_TOKENS = 8


def parity_cases(base: BaseModel, texts: Sequence[str], *, reserved: int = 0) -> list[Case]:
    """Return cases that cover batch 1, batch 3 with rows of different lengths, and several lengths.

    Args:
        base: the model.
        texts: used where the base has a tokenizer; otherwise token ids are drawn from a fixed seed.
        reserved: positions of a decoder that are left to adapters' virtual tokens.
    """
    if base.task == "module":
        return [dict(base.example_inputs), *_resized_module_cases(base)]
    kind = task_of(base).__name__.rsplit(".", 1)[-1]
    if kind == "decoder":
        limit = max(1, _length_limit(base) - reserved)
        return [
            _token_case(base, texts, [min(12, limit)]),
            _token_case(base, texts, [min(length, limit) for length in (9, 4, 7)]),
        ]
    if kind == "seq2seq":
        return [_seq2seq_case(base, texts, [10]), _seq2seq_case(base, texts, [9, 4, 7])]
    limit = _length_limit(base)
    return [_single_case(base, texts, [min(length, limit) for length in lengths]) for lengths in ([5], [12], [9, 4, 7])]


def sample_cases(
    base: BaseModel,
    texts: Sequence[str],
    arrays: Mapping[str, NDArray[np.generic]] | None,
    *,
    tokens_per_text: int = 64,
    reserved: int = 0,
) -> list[Case]:
    """Return one case per sample, for the quality table and for calibration.

    Args:
        base: the model.
        texts: one case each, cut at `tokens_per_text` tokens.
        arrays: samples by input name, stacked on axis 0, instead of texts.
        tokens_per_text: bounds the memory that the reference's logits take.
        reserved: positions of a decoder that are left to adapters' virtual tokens.
    """
    if arrays is not None:
        return _array_cases(base, arrays)
    if base.task == "module":
        return [dict(base.example_inputs)]
    kind = task_of(base).__name__.rsplit(".", 1)[-1]
    limit = max(1, min(tokens_per_text, _length_limit(base) - reserved))
    if kind == "decoder":
        return [_token_case(base, [text], [limit], exact=False) for text in texts]
    if kind == "seq2seq":
        return [_seq2seq_case(base, [text], [limit], exact=False) for text in texts]
    if "input_ids" in single_pass.inputs(base)[0]:
        return [_single_case(base, [text], [limit], exact=False) for text in texts]
    generator = torch.Generator().manual_seed(SEED + 1)
    return [_single_case(base, texts, [1], generator=generator) for _ in range(16)]


def _array_cases(base: BaseModel, arrays: Mapping[str, NDArray[np.generic]]) -> list[Case]:
    wanted = set(base.example_inputs) or {
        name for trace in task_of(base).traces(base).values() for name in trace.inputs
    }
    unknown = sorted(set(arrays) - wanted)
    if unknown:
        raise ExportError(
            f"the samples hold {', '.join(unknown)}, which {base.name} does not take",
            hint=f"inputs of this model: {', '.join(sorted(wanted))}",
        )
    count = min(len(array) for array in arrays.values())
    return [
        {name: torch.from_numpy(np.ascontiguousarray(array[i : i + 1])) for name, array in arrays.items()}
        for i in range(count)
    ]


def _length_limit(base: BaseModel) -> int:
    generation = task_of(base).generation(base)
    text = getattr(base.config, "text_config", base.config)
    limit = generation.max_length if generation is not None else getattr(text, "max_position_embeddings", 512)
    # RoBERTa counts its positions from padding_idx + 1.
    return max(1, int(limit) - 2)


def _tokens(base: BaseModel, texts: Sequence[str], row: int, length: int, *, exact: bool) -> list[int]:
    """Return `length` token ids of text `row`, fewer where the text is shorter unless `exact`."""
    vocabulary = int(getattr(getattr(base.config, "text_config", base.config), "vocab_size", 2))
    if "tokenizer.json" in base.assets and texts:
        ids = list(_tokenizer(base.assets["tokenizer.json"]).encode(texts[row % len(texts)]).ids)[:length]
        if ids and max(ids) < vocabulary and (len(ids) == length or not exact):
            return ids
    generator = torch.Generator().manual_seed(SEED + row)
    drawn: list[int] = torch.randint(min(3, vocabulary - 1), vocabulary, (length,), generator=generator).tolist()
    return drawn


@lru_cache(maxsize=1)
def _tokenizer(data: bytes) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_case(base: BaseModel, texts: Sequence[str], lengths: Sequence[int], *, exact: bool = True) -> Case:
    """Return input_ids and attention_mask int64[batch, longest], padded on the right."""
    rows = [_tokens(base, texts, row, length, exact=exact) for row, length in enumerate(lengths)]
    longest = max(map(len, rows))
    pad = getattr(base.config, "pad_token_id", None) or 0
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _seq2seq_case(base: BaseModel, texts: Sequence[str], lengths: Sequence[int], *, exact: bool = True) -> Case:
    encoder: Case
    if base.task == "automatic-speech-recognition":
        generator = torch.Generator().manual_seed(SEED)
        shape = (len(lengths), base.config.num_mel_bins, 2 * base.config.max_source_positions)
        encoder = {"input_features": torch.randn(shape, generator=generator)}
    else:
        encoder = _token_case(base, texts, lengths, exact=exact)
    start = base.config.decoder_start_token_id or 0
    rows = [[start, *_tokens(base, texts, row + 5, DECODER_TOKENS - 1, exact=True)] for row in range(len(lengths))]
    return {**encoder, "decoder_input_ids": torch.tensor(rows)}


def _single_case(
    base: BaseModel,
    texts: Sequence[str],
    lengths: Sequence[int],
    *,
    exact: bool = True,
    generator: torch.Generator | None = None,
) -> Case:
    """Return a case for a single-pass model: tokens from texts, everything else drawn from a seed."""
    example, _axes = single_pass.inputs(base)
    generator = generator or torch.Generator().manual_seed(SEED + len(lengths))
    tokens = _token_case(base, texts, lengths, exact=exact) if "input_ids" in example else {}
    case: Case = {}
    for name, tensor in example.items():
        if name in tokens:
            case[name] = tokens[name]
        elif tensor.is_floating_point():
            case[name] = torch.randn((len(lengths), *tensor.shape[1:]), generator=generator)
        else:
            case[name] = torch.zeros_like(tokens.get("input_ids", tensor))
    return case


def _resized_module_cases(base: BaseModel) -> list[Case]:
    """Return the module's example with another batch size, where the user said that the batch varies."""
    batched = [name for name, axes in base.dynamic_axes.items() if 0 in axes]
    if set(batched) != set(base.example_inputs):
        return []
    return [
        {
            name: torch.cat([tensor, tensor, tensor])[: tensor.shape[0] + 1]
            for name, tensor in base.example_inputs.items()
        }
    ]
