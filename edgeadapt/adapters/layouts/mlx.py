"""LoRA and DoRA as MLX-LM saves them: adapters.safetensors with lora_a [in, r], lora_b [r, out] and, for DoRA, m [out].

adapter_config.json holds all settings of the training, of which loading uses three: fine_tune_type, num_layers (the
last so many layers; -1 for all) and lora_parameters, whose scale multiplies the product as it is (no alpha, no rank).
Source: mlx_lm/tuner/{lora,dora,utils}.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeadapt.adapters.adapter import Adapter, BaseReference, TensorRef
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.peft_files import CONFIG, read_config
from edgeadapt.adapters.plain_lora import Pair, check_pair, peft_config, peft_tensors, transposed
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.errors import AdapterError

TENSORS = "adapters.safetensors"
_AGAIN = "copy the folder again from where the adapter was trained"
_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys"})
_UNUSED = frozenset({"alpha"})  # mlx_lm writes it in old configs and never reads it
_PARTS = frozenset({"lora_a", "lora_b", "m"})
_LAYER = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.(?P<inside>.+)")


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a config of MLX-LM's shape."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(config, dict) or "peft_type" in config:
        return False
    return "fine_tune_type" in config or "lora_parameters" in config


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    config = read_config(folder)
    file = folder / CONFIG
    try:
        method, parameters, layers = _settings(config)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error.message}", hint=error.hint) from error
    if not (folder / TENSORS).is_file():
        raise AdapterError(f"{folder} has {CONFIG} but no {TENSORS}", hint=_AGAIN)
    pairs = _pairs(read_tensors(folder / TENSORS), parameters, method)
    targets = _targets(pairs, parameters.get("keys"), layers, folder)
    base, warnings = _base(config, folder, root)
    return Adapter(
        *(name, folder, "lora", "mlx", peft_config(pairs, targets=targets), peft_tensors(pairs), base),
        warnings=(*warnings, *_not_read(folder)),
    )


def _settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], int]:
    """Return the method, its parameters and the number of layers (0 for all)."""
    method = config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        raise AdapterError(
            f"fine_tune_type is {method!r}: only 'lora' and 'dora' are adapters",
            hint="give a model that was trained whole as --base" if method == "full" else _AGAIN,
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(f"lora_parameters is {parameters!r}, not a table", hint=_AGAIN)
    if unknown := sorted(parameters.keys() - _PARAMETERS - _UNUSED):
        raise AdapterError(
            f"lora_parameters has an unknown key {unknown[0]!r}, set to {parameters[unknown[0]]!r}",
            hint="update edgeadapt, or remove the key if it has no effect after training",
        )
    for key, types, form in (("rank", int, "whole number"), ("scale", int | float, "number")):
        value: Any = parameters.get(key)
        if not isinstance(value, types) or isinstance(value, bool) or not 0 < value < math.inf:
            raise AdapterError(f"lora_parameters.{key} is {value!r}, not a {form} above 0", hint=_AGAIN)
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
        raise AdapterError(f"lora_parameters.keys is {keys!r}, not a list of names", hint=_AGAIN)
    layers = config.get("num_layers", config.get("lora_layers"))
    if not isinstance(layers, int) or isinstance(layers, bool):
        raise AdapterError(f"num_layers is {layers!r}, not a whole number", hint=_AGAIN)
    return method, parameters, max(layers, 0)


def _pairs(tensors: Mapping[str, TensorRef], parameters: Mapping[str, Any], method: str) -> dict[str, Pair]:
    """Return every module's factors; every tensor is part of one."""
    modules: dict[str, dict[str, TensorRef]] = {}
    wanted = _PARTS if method == "dora" else _PARTS - {"m"}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part not in wanted or not module:
            raise AdapterError(
                f"tensor {key!r} in {tensor.file} is no part of a {method} adapter, which has "
                f"{', '.join(sorted(wanted))}",
                hint="quantized factors, experts' and modules trained whole are not read from MLX-LM; give the adapter "
                "as trained",
            )
        modules.setdefault(module, {})[part] = tensor
    found = {}
    for module, parts in modules.items():
        file = next(iter(parts.values())).file
        if missing := sorted(wanted - parts.keys()):
            there = min(parts)
            raise AdapterError(
                f"tensor '{module}.{missing[0]}' is missing in {file} ('{module}.{there}' is there)", hint=_AGAIN
            )
        if "embed" in module.rpartition(".")[2] or module.endswith("wte"):
            raise AdapterError(
                f"tensor '{module}.lora_a' in {file} changes an embedding: where it is tied, MLX-LM changes the output "
                "layer with it, which edgeadapt does not do",
                hint="train without the embedding among lora_parameters.keys",
            )
        pair = Pair(
            *(transposed(parts["lora_a"]), transposed(parts["lora_b"]), float(parameters["scale"])), parts.get("m")
        )
        check_pair(pair)
        if pair.rank != parameters["rank"]:
            raise AdapterError(
                f"tensor '{module}.lora_a' in {file} has rank {pair.rank}, but lora_parameters.rank is "
                f"{parameters['rank']}",
                hint="copy the adapter_config.json that was saved with these tensors",
            )
        found[module] = pair
    return found


def _targets(pairs: Mapping[str, Pair], keys: list[str] | None, layers: int, folder: Path) -> str:
    """Return the regular expression of the modules that must have factors: `keys` in the last `layers` layers."""
    inside = [match for module in pairs if (match := _LAYER.fullmatch(module))]
    outside = sorted(pairs.keys() - {match[0] for match in inside})
    lists = sorted({match["list"] for match in inside})
    if len(lists) > 1:
        raise AdapterError(
            f"{folder / TENSORS} has layers in {' and '.join(lists)}, and MLX-LM trains those of one list", hint=_AGAIN
        )
    if strange := [name for name in outside if keys is None or name not in keys]:
        raise AdapterError(
            f"tensor '{strange[0]}.lora_a' in {folder / TENSORS} is in no layer, and lora_parameters.keys does not "
            "name its module",
            hint="copy the adapter_config.json that was saved with these tensors",
        )
    indices = sorted({int(match["index"]) for match in inside})
    if layers and indices and indices != list(range(indices[-1] - layers + 1, indices[-1] + 1)):
        raise AdapterError(
            f"num_layers is {layers}, the last so many, but {folder / TENSORS} has layers "
            f"{', '.join(map(str, indices))}",
            hint=_AGAIN,
        )
    names = sorted(keys or {match["inside"] for match in inside})
    numbers = "|".join(map(str, indices)) if layers else r"\d+"
    wanted = [re.escape(name) for name in outside]
    if inside:
        wanted.append(rf"{re.escape(lists[0])}\.(?:{numbers})\.(?:{'|'.join(map(re.escape, names))})")
    return "|".join(wanted)


def _base(config: Mapping[str, Any], folder: Path, root: Path) -> tuple[BaseReference, list[str]]:
    name = config.get("model")
    found = find_fingerprint(folder, root, name if isinstance(name, str) and name else None, None)
    warnings = []
    if found.fingerprint is None:
        warnings.append(f"no {FINGERPRINT}: only the base's module names and shapes can be checked")
    if found.name is None:
        warnings.append("model is empty: the adapter does not say which base it was trained on")
    elif re.search(r"\d-?bit|-q\d|mxfp4", found.name, re.IGNORECASE):
        warnings.append(
            f"it was trained on {found.name!r}, by its name a quantized base: this one's weights may differ"
        )
    return found, warnings


def _not_read(folder: Path) -> list[str]:
    found = sorted(item.name for item in folder.glob(f"*_{TENSORS}"))
    return [f"not read: the trainer's checkpoints {', '.join(found)}"] if found else []
