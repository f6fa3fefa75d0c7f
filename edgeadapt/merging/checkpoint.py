"""A Hugging Face folder as a torch model in float32, with nothing missing and nothing left over."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeadapt.errors import BaseModelError
from edgeadapt.files import parse_json, read_bytes
from edgeadapt.merging.nf4 import dequantize_state
from edgeadapt.merging.quiet import quiet
from edgeadapt.merging.tasks import LABELLED, OWN_HEAD, model_class

_WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError,
)  # fmt: skip
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: `untrained` names the parameters that it does not hold, now zero."""

    module: nn.Module
    task: str
    untrained: tuple[str, ...]
    quantized_from: str | None = None


def load_folder(folder: Path, task: str | None, num_labels: int | None) -> Checkpoint:
    """Return the model in a Hugging Face folder.

    Raises:
        BaseModelError: if files are missing or damaged, the model cannot do the task, or weights are lacking.
    """
    where = str(folder)
    raw = _raw_config(folder)
    method = _quantization(raw, where)
    config = _config(folder, raw)
    task, cls = model_class(config, task, where)
    _set_num_labels(config, task, num_labels)
    if method is None:
        return load_model(cls, config, task, where, folder=folder)
    del config.quantization_config
    state = dequantize_state(dict(_tensors(folder)), where)
    return load_model(cls, config, task, where, state=_as_in_model(cls, config, state), quantized_from=method)


def load_model(
    cls: Any,
    config: Any,
    task: str,
    where: str,
    *,
    folder: Path | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    quantized_from: str | None = None,
) -> Checkpoint:
    """Return a model of class `cls` with the weights of `folder`, or with the tensors of `state`.

    Raises:
        BaseModelError: if the weights cannot be read or do not fit the config.
    """
    from safetensors import SafetensorError

    source: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
    try:
        with quiet():
            module, info = cls.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **source,
            )
    except ImportError as error:
        raise BaseModelError(
            f"{where} cannot be loaded as {cls.__name__}: {_first_line(error)}", hint="install what it names"
        ) from error
    except (*_LOADING_ERRORS, SafetensorError) as error:
        raise BaseModelError(
            f"{where} cannot be loaded as {cls.__name__}: {_first_line(error)}",
            hint="download or save the model again; a file is damaged or missing",
        ) from error
    untrained = _check_complete(module, info, task, where)
    module.config.architectures = [cls.__name__]  # as save_pretrained does; the folder may be of another head
    return Checkpoint(frozen(module, untrained, where), task, untrained, quantized_from)


def frozen(module: nn.Module, untrained: tuple[str, ...], where: str) -> nn.Module:
    """Return `module` in eval mode without gradients, its untrained parameters zero and all others finite.

    Raises:
        BaseModelError: if a weight is NaN or infinite.
    """
    module.eval().requires_grad_(requires_grad=False)
    for name, parameter in module.named_parameters():
        if name in untrained:
            parameter.zero_()
        elif not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):  # the sum is fast
            raise BaseModelError(
                f"{where}: the weight {name} holds NaN or infinite values", hint="download or save the model again"
            )
    return module


def _raw_config(folder: Path) -> dict[str, Any]:
    where = str(folder)
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise BaseModelError(
            f"{where} holds an adapter, not a base model" if adapter else f"{where} holds no config.json",
            hint="give the model that the adapter was trained on, and the adapter as ADAPTER"
            if adapter
            else "give the folder of a Hugging Face model, a .gguf file, or a hub id",
        )
    if (folder / "adapter_config.json").is_file():
        raise BaseModelError(
            f"{where} holds a model and an adapter (adapter_config.json), which would be loaded on top of it unasked",
            hint="move the adapter's files to a folder of their own",
        )
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise BaseModelError(
            f"{where} holds no weights: none of {', '.join(_WEIGHT_FILES)}",
            hint="the download is incomplete; download the model again",
        )
    raw = parse_json(read_bytes(folder / "config.json"), str(folder / "config.json"), BaseModelError)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise BaseModelError(
            f"{folder / 'config.json'} names no model_type", hint="use the config.json that came with the model"
        )
    return raw


def _config(folder: Path, raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, __version__

    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if raw["model_type"] in CONFIG_MAPPING:
            problem, hint = _first_line(error), "use the config.json that came with the model"
        else:
            problem = f"transformers {__version__} knows no model type {raw['model_type']!r}"
            hint = "code that comes with a model is never run; only architectures of transformers can be loaded"
        raise BaseModelError(f"{folder / 'config.json'}: {problem}", hint=hint) from error


def _quantization(raw: Mapping[str, Any], where: str) -> str | None:
    """Return "nf4" or None.

    Raises:
        BaseModelError: if the weights are quantized in another way.
    """
    entry = raw.get("quantization_config")
    if entry is None:
        return None
    method = str(entry.get("quant_method", "unknown")) if isinstance(entry, dict) else "unknown"
    if method == "bitsandbytes" or (method == "unknown" and isinstance(entry, dict) and entry.get("load_in_4bit")):
        kind = str(entry.get("bnb_4bit_quant_type", "fp4")) if entry.get("load_in_4bit") else "int8"
        if kind == "nf4":
            return "nf4"
        method = f"bitsandbytes {kind}"
    raise BaseModelError(
        f"{where}: the weights are quantized with {method}",
        hint="only NF4 (bitsandbytes) is read; give the folder of the unquantized model",
    )


def _set_num_labels(config: Any, task: str, num_labels: int | None) -> None:
    if num_labels is None:
        return
    if task not in LABELLED:
        raise BaseModelError(
            f"a number of labels ({num_labels}) was given, but the task {task!r} has none",
            hint=f"leave it out, or give one of the tasks {', '.join(sorted(LABELLED))}",
        )
    if num_labels < 1:
        raise BaseModelError(f"{num_labels} labels are too few", hint="give the number of classes, 1 or more")
    if config.num_labels != num_labels:
        config.num_labels = num_labels


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseModelError(
            f"{folder} holds NF4 weights, but no safetensors file", hint="save the model with safe_serialization=True"
        )
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{path} is damaged: {error}", hint="download or save the model again") from error


def _as_in_model(cls: Any, config: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with GPT-2's Conv1D weights turned back to [in, out]; bitsandbytes stores them as [out, in]."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        skeleton = cls(config)
    names = {f"{path}.weight" for path, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    prefix = f"{skeleton.base_model_prefix}."
    names |= {name.removeprefix(prefix) for name in names}
    return {key: value.T.contiguous() if key in names else value for key, value in state.items()}


def _check_complete(module: Any, info: Mapping[str, Any], task: str, where: str) -> tuple[str, ...]:
    """Return the parameters of the head that the checkpoint lacks.

    Raises:
        BaseModelError: if it lacks other weights, has them in another shape, or has layers that the config does not.
    """
    known = dict(module.named_parameters())
    lacking = sorted(name for name in info["missing_keys"] if not _own_head(module, name, task))
    if lacking:
        raise BaseModelError(
            f"{where} lacks {len(lacking)} weights of a {type(module).__name__}: {_some(lacking)}",
            hint="give the base that the adapter was trained on, or the task that this model was made for",
        )
    mismatched = sorted(name for name in info["mismatched_keys"] if not _own_head(module, name, task))
    if mismatched:
        wanted = f" (config.json asks for {tuple(known[mismatched[0]].shape)})" if mismatched[0] in known else ""
        raise BaseModelError(
            f"{where}: {len(mismatched)} weights have another shape than config.json says: {mismatched[0]}{wanted}",
            hint="config.json and the weights are of different models; download the model again",
        )
    patterns = {_pattern(name) for name in known}
    beyond = sorted(name for name in info["unexpected_keys"] if _pattern(name) in patterns)
    if beyond:
        raise BaseModelError(
            f"{where} holds layers that config.json does not count: {_some(beyond)}",
            hint="config.json and the weights are of different models; download the model again",
        )
    return tuple(sorted({*info["missing_keys"], *info["mismatched_keys"]} & known.keys()))


def _own_head(module: Any, name: str, task: str) -> bool:
    """Return whether parameter `name` belongs to a head that is trained with the adapter, or to an unused pooler."""
    if task == "feature-extraction":
        return "pooler" in name.split(".")
    prefix = module.base_model_prefix
    return task in OWN_HEAD and hasattr(module, prefix) and not name.startswith(f"{prefix}.")


def _pattern(name: str) -> str:
    """Return a name without the numbers of its layers, None-like for names without any."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
    return pattern if pattern != name else f"={name}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
