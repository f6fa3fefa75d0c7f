"""A base from wherever it is: a Hugging Face folder, a hub id, a GGUF file, or a plain torch module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeadapt.errors import BaseModelError
from edgeadapt.merging.assets import folder_assets
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.checkpoint import frozen, load_folder
from edgeadapt.merging.gguf_model import load_gguf
from edgeadapt.merging.hub import hub_folder, looks_like_hub_id
from edgeadapt.merging.modules import target_modules
from edgeadapt.merging.quantized_base import as_nf4


def load_base_model(
    source: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
    quantize_as: str | None = None,
) -> BaseModel:
    """Return the base at `source` in float32.

    Args:
        source: a Hugging Face folder, a `.gguf` file, or a hub id; what exists on disk comes first.
        task: what the model shall do; without it, what its config says.
        num_labels: classes of a classification head that the base itself does not have.
        revision: branch, tag or commit of a hub id.
        quantize_as: "nf4" rounds the weights as QLoRA does, for adapters that were trained on such a base.

    Raises:
        BaseModelError: if it cannot be found or loaded, is incomplete or cannot do the task.
    """
    if quantize_as not in {None, "nf4"}:
        raise BaseModelError(f"a base cannot be quantized as {quantize_as!r}", hint='known: "nf4"')
    path = Path(source).expanduser()
    if path.is_file() or str(source).endswith(".gguf"):
        _no_revision(source, revision)
        base = load_gguf(path, task=task, num_labels=num_labels)
    elif path.is_dir():
        _no_revision(source, revision)
        base = _from_folder(path, path.resolve().name, None, task, num_labels)
    elif isinstance(source, str) and looks_like_hub_id(source):
        folder, commit = hub_folder(source, revision)
        base = _from_folder(folder, source, commit, task, num_labels)
    else:
        raise BaseModelError(
            f"there is no folder or file {str(source)!r}", hint="check the path, or give a hub id such as owner/name"
        )
    return as_nf4(base) if quantize_as == "nf4" and base.quantized_from is None else base


def base_from_module(
    module: nn.Module,
    *,
    name: str,
    example_inputs: Mapping[str, torch.Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    output_names: tuple[str, ...] = (),
) -> BaseModel:
    """Return a base made of a copy of a plain torch module, in float32 and eval mode.

    Args:
        module: any module; its forward takes tensors by keyword and returns a tensor, a tuple or a mapping of tensors.
        name: what to call it.
        example_inputs: the forward's keyword arguments.
        dynamic_axes: which axes of which input vary, and what they are called.
        output_names: names of the outputs, in order; "output" or "output_0", ... without.

    Raises:
        BaseModelError: if there are no inputs, an axis is of an input that does not exist, or weights are not finite.
    """
    if not example_inputs:
        raise BaseModelError(f"{name}: there are no example inputs", hint="give the forward's arguments by name")
    for key, axes in dynamic_axes.items():
        rank = example_inputs[key].ndim if key in example_inputs else None
        if rank is None or any(not 0 <= axis < rank for axis in axes):
            raise BaseModelError(
                f"{name}: the dynamic axes {dict(axes)} of input {key!r} do not exist",
                hint=f"inputs: {', '.join(f'{key} {list(value.shape)}' for key, value in example_inputs.items())}",
            )
    own = frozen(copy.deepcopy(module).float(), (), name)
    return BaseModel(
        module=own,
        name=name,
        revision=None,
        task="module",
        model_type="module",
        modules=target_modules(own),
        example_inputs={key: value.detach().clone() for key, value in example_inputs.items()},
        dynamic_axes={key: dict(axes) for key, axes in dynamic_axes.items()},
        output_names=tuple(output_names),
    )


def _from_folder(folder: Path, name: str, revision: str | None, task: str | None, num_labels: int | None) -> BaseModel:
    checkpoint = load_folder(folder, task, num_labels)
    config: Any = checkpoint.module.config
    return BaseModel(
        module=checkpoint.module,
        name=name,
        revision=revision,
        task=checkpoint.task,
        model_type=config.model_type,
        modules=target_modules(checkpoint.module),
        assets=folder_assets(folder, config),
        quantized_from=checkpoint.quantized_from,
        untrained=checkpoint.untrained,
    )


def _no_revision(source: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise BaseModelError(
            f"revision {revision!r} was given, but {str(source)!r} is on this machine and has no revisions",
            hint="leave the revision out, or give a hub id",
        )
