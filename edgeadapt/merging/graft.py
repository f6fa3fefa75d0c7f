"""A second model over the same weights, in which some can be exchanged without touching the first."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from edgeadapt.errors import MergeError


def share(module: nn.Module) -> nn.Module:
    """Return a copy of `module` with parameters and buffers of its own over the same memory.

    Only the Python objects are copied, so this costs no memory worth naming. Tied parameters stay tied. What is done
    to the copy (hooks, wrapping, exchanged parameters, requires_grad) does not reach `module`, but writing into a
    parameter's memory does: exchange a parameter with `set_parameter` instead.

    Raises:
        MergeError: if the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in module.buffers():
        memo.setdefault(id(buffer), buffer.detach())
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise MergeError(
            f"a {type(module).__name__} cannot be copied: {error}",
            hint="keep open files, locks, lambdas and intermediate tensors out of the module's attributes",
        ) from error


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns parameter `name` ("classifier.weight"), and the name it has there ("weight").

    Raises:
        MergeError: if the model has no such parameter.
    """
    path, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        owner = nn.Module()
    if owner._parameters.get(attribute) is None:  # noqa: SLF001
        raise MergeError(
            f"{type(model).__name__} has no parameter {name!r}",
            hint="the adapter was made for another architecture; give the base that it was trained on",
        )
    return owner, attribute


def set_parameter(owner: nn.Module, attribute: str, value: torch.Tensor) -> None:
    """Give `owner` a parameter of its own, of any shape; whatever shared the old one keeps the old one."""
    owner._parameters[attribute] = nn.Parameter(value.to(torch.float32), requires_grad=False)  # noqa: SLF001
    if attribute != "weight":
        return
    axes = {"out_features": 0, "in_features": 1, "num_embeddings": 0, "embedding_dim": 1, "out_channels": 0}
    for field, axis in axes.items():
        if isinstance(getattr(owner, field, None), int) and value.ndim > axis:
            setattr(owner, field, int(value.shape[axis]))


def follow_rows(model: nn.Module, before: int, after: int) -> None:
    """Tell the config that a parameter's first axis grew or shrank: classes of a head, or tokens of an embedding.

    The names of new classes are unknown: LABEL_0, ...
    """
    config = getattr(model, "config", None)
    if config is None or before == after:
        return
    if getattr(config, "vocab_size", None) == before:
        config.vocab_size = after
    elif getattr(config, "num_labels", None) == before:
        config.num_labels = after
        if isinstance(getattr(model, "num_labels", None), int):
            model.num_labels = after  # type: ignore[assignment]


def shared_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of each group of parameters that are one and the same, sorted."""
    groups: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # each module once, so two modules with one parameter are two names
        for attribute, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None:
                groups.setdefault(id(parameter), []).append(f"{path}.{attribute}" if path else attribute)
    return sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1)


def keep_untied(model: nn.Module) -> None:
    """Stop transformers from tying the model's embeddings again, now or when something calls `tie_weights`.

    The config says so too, except where the model's arithmetic hangs on that entry (T5 scales the hidden states of a
    tied head).
    """
    model.tie_weights = _stay_untied  # type: ignore[assignment]
    config = getattr(model, "config", None)
    if config is None or _forward_reads_tie(model):
        return
    for entry in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
        if getattr(entry, "tie_word_embeddings", False):
            entry.tie_word_embeddings = False


def _stay_untied(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing."""


def _forward_reads_tie(model: nn.Module) -> bool:
    classes = {type(module) for module in model.modules() if type(module).__module__.startswith("transformers.")}
    return any("tie_word_embeddings" in inspect.getsource(cls.forward) for cls in classes)
