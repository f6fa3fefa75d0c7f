"""What an adapter is, for people and for loading its base; nothing here needs the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.adapters.read import kind_module
from edgeadapt.adapters.selection import is_saved

_TASKS: Mapping[str, str] = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
}
_HEADS = ("score", "classifier", "classifier.out_proj", "classifier.1", "classification_head.out_proj")


def task_of(adapter: Adapter) -> str | None:
    """Return the optimum task that the adapter was trained for, None if its config does not say."""
    return _TASKS.get(str(adapter.config.get("task_type")))


def default_head_size(adapter: Adapter) -> int | None:
    """Return the number of labels of the adapter's own classification head, None if it has none."""
    for head in _HEADS:
        for key, tensor in adapter.tensors.items():
            module = key.removesuffix(".weight")
            ends = module == head or module.endswith(f".{head}")
            if ends and key != module and is_saved(adapter.config, module):
                return tensor.shape[0]
    return None


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    file = next(iter(adapter.tensors.values())).file
    own = {key: tensor for key, tensor in adapter.tensors.items() if ".base_layer." not in key}
    return {
        "name": adapter.name,
        "kind": adapter.kind,
        "layout": adapter.layout,
        "task": task_of(adapter),
        "labels": default_head_size(adapter),
        "base": {
            "name": adapter.base.name,
            "revision": adapter.base.revision,
            "quantization": adapter.base.quantization,
            "fingerprint": adapter.base.fingerprint is not None,
        },
        "parameters": sum(math.prod(tensor.shape) for tensor in own.values()),
        "tensors": len(adapter.tensors),
        "dtypes": sorted({tensor.dtype for tensor in adapter.tensors.values()}),
        "file_bytes": file.stat().st_size,
        **kind_module(adapter.kind).describe(adapter),
        "warnings": list(adapter.warnings),
    }
