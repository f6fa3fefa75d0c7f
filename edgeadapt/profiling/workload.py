"""What is run while measuring: prompts of random tokens, or one input of a single-pass model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import ProfileError
from edgeadapt.runtime import Session
from edgeadapt.runtime.ort import TensorInfo
from edgeadapt.runtime.tokenizer import read_json_asset

Array = NDArray[Any]
_SEED = 0


@dataclass(frozen=True)
class Workload:
    """How much is run. Speed does not depend on which tokens are read, so they are random.

    prompt_tokens: tokens read before the first new one, for each length that is timed; the first one's text goes on
        (single pass: the length of a text)
    new_tokens: tokens written after it; repeats: how often; batch_size: rows at once
    """

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    repeats: int
    batch_size: int = 1


def example_inputs(session: Session, role: str | None, workload: Workload) -> dict[str, Array]:
    """Return an input of the right shape for a graph.

    Raises:
        ProfileError: if the length of an axis cannot be known.
    """
    expected = session.inputs(role)
    sizes = _sizes(session, workload)
    unknown = [axis for info in expected.values() for axis in info.shape if _length(axis, sizes) is None]
    if unknown:
        return _from_golden(session, expected, unknown[0])
    rng = np.random.default_rng(_SEED)
    return {name: _fill(name, info, sizes, rng, session) for name, info in expected.items()}


def _sizes(session: Session, workload: Workload) -> dict[str, int]:
    """Return lengths for axes by a part of their name."""
    tokens = workload.prompt_tokens[0]
    if "tokenizer.json" in session.bundle.asset_names and session.text.max_length is not None:
        tokens = min(tokens, session.text.max_length)
    sizes = {"batch": workload.batch_size, "seq": tokens, "length": tokens, "channel": 3}
    picture = read_json_asset(session.bundle, "preprocessor_config.json")
    config = read_json_asset(session.bundle, "config.json")
    size = (picture.get("crop_size") if picture.get("do_center_crop") else None) or picture.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if isinstance(size, Mapping) and "shortest_edge" in size:
        size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
    if not isinstance(size, Mapping) and isinstance(config.get("image_size"), int):
        size = {"height": config["image_size"], "width": config["image_size"]}
    if isinstance(size, Mapping):
        sizes |= {name: int(size[name]) for name in ("height", "width") if isinstance(size.get(name), int)}
    return sizes


def _length(axis: int | str | None, sizes: Mapping[str, int]) -> int | None:
    if isinstance(axis, int):
        return axis
    return next((value for part, value in sizes.items() if axis is not None and part in axis), None)


def _fill(name: str, info: TensorInfo, sizes: Mapping[str, int], rng: np.random.Generator, session: Session) -> Array:
    shape = [_length(axis, sizes) or 1 for axis in info.shape]
    if info.dtype.kind == "f":
        return rng.normal(size=shape).astype(info.dtype)
    if "mask" in name:
        return np.ones(shape, info.dtype)
    if "input_ids" in name:
        vocabulary = read_json_asset(session.bundle, "config.json").get("vocab_size", 100)
        # the lowest ids are special tokens, of which some models allow only one
        return rng.integers(min(10, vocabulary - 1), vocabulary, shape).astype(info.dtype)
    return np.zeros(shape, info.dtype)


def _from_golden(session: Session, expected: Mapping[str, TensorInfo], axis: int | str | None) -> dict[str, Array]:
    for adapter in session.adapters:
        inputs = session.bundle.golden(adapter).inputs
        if set(expected) <= set(inputs):
            return {name: np.asarray(inputs[name]) for name in expected}
    raise ProfileError(
        f"the length of axis {axis!r} of the model's input is not known, and no golden says it",
        hint="add an adapter (its golden holds an input), or export with axes named batch, seq, height, width",
    )
