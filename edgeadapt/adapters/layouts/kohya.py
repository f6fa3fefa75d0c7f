"""LoRA as kohya's sd-scripts save it: a .safetensors file of PATH.lora_down.weight, PATH.lora_up.weight and PATH.alpha.

PATH is a prefix for the network ("lora_te_") and the module's path with underscores for dots, so that only the base can
tell which module it is: see `paths_of_base`. The product is scaled by alpha over the rank, or by 1 where alpha is not
there or 0 (networks/lora.py, `LoRAModule`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeadapt.adapters.adapter import Adapter, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.peft_files import CONFIG
from edgeadapt.adapters.plain_lora import Pair, check_pair, peft_config, peft_tensors
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.errors import AdapterError

FLAT = "flat_names"
"""The config's entry that says that the modules' names still have underscores for dots."""
_AGAIN = "copy the file again from where the adapter was trained"
_PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_unet_", "lora_")
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
_PEEK = 1 << 20  # bytes of a header that are looked at


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a file with keys of this shape, and no config."""
    return not (folder / CONFIG).is_file() and bool(_files(folder))


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    files = _files(folder)
    if len(files) > 1:
        raise AdapterError(
            f"{folder} holds several adapters: {', '.join(file.name for file in files)}",
            hint="give each a folder of its own",
        )
    pairs = _pairs(read_tensors(files[0]), files[0])
    base = find_fingerprint(folder, root, None, None)
    warnings = ["the file does not say which base it was trained on"]
    if base.fingerprint is None:
        warnings.append(f"no {FINGERPRINT}: only the base's module names and shapes can be checked")
    config = peft_config(pairs) | {FLAT: True}
    return Adapter(name, folder, "lora", "kohya", config, peft_tensors(pairs), base, tuple(warnings))


def fit(adapter: Adapter, modules: Mapping[str, TargetModule], head_dim: int | None) -> Adapter:
    """Return the adapter with the names of the base's modules; see `paths_of_base`."""
    del head_dim
    return paths_of_base(adapter, modules)


def paths_of_base(adapter: Adapter, modules: Iterable[str]) -> Adapter:
    """Return the adapter with the names of the base's `modules`; one of another layout as it is.

    Raises:
        AdapterError: a name is that of no module or of several, or the names have several prefixes.
    """
    if adapter.layout != "kohya" or FLAT not in adapter.config:
        return adapter
    by_flat: dict[str, list[str]] = {}
    for path in modules:
        by_flat.setdefault(path.replace(".", "_"), []).append(path)
    names = sorted({key.partition(".lora_")[0] for key in adapter.tensors})
    prefixes = {name: _prefix(adapter, name, by_flat) for name in names}
    if len(set(prefixes.values())) > 1:
        raise AdapterError(
            f"adapter {adapter.name!r} changes several networks: {', '.join(sorted(set(prefixes.values())))}",
            hint="give a file with the tensors of one network",
        )
    paths = {name: by_flat[name.removeprefix(prefix)][0] for name, prefix in prefixes.items()}
    return _renamed(adapter, paths)


def _prefix(adapter: Adapter, name: str, by_flat: Mapping[str, list[str]]) -> str:
    """Return the prefix behind which `name` is a module of the base, in one way only."""
    found = [
        (prefix, path)
        for prefix in _PREFIXES
        if name.startswith(prefix)
        for path in by_flat.get(name.removeprefix(prefix), ())
    ]
    if len(found) == 1:
        return found[0][0]
    if not found:
        raise AdapterError(
            f"adapter {adapter.name!r}: {name!r} is no module of the base",
            hint="give the base that the adapter was trained on",
        )
    raise AdapterError(
        f"adapter {adapter.name!r}: {name!r} can be {' or '.join(repr(path) for _, path in found)} in the base",
        hint="give the adapter as peft saved it",
    )


def _renamed(adapter: Adapter, paths: Mapping[str, str]) -> Adapter:
    tensors, config = adapter.tensors, adapter.config
    pairs = {}
    for name, path in paths.items():
        a, b = (tensors[f"{name}.lora_{factor}.weight"] for factor in "AB")
        alpha = config["alpha_pattern"].get(re.escape(name), config["lora_alpha"])
        pairs[path] = Pair(a, b, alpha / a.shape[0])
    return dataclasses.replace(adapter, tensors=peft_tensors(pairs), config=peft_config(pairs))


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if file.is_file() and _has_factors(file)]


def _has_factors(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return b".lora_down.weight" in stream.read(_PEEK)
    except OSError:
        return False


def _pairs(tensors: Mapping[str, TensorRef], file: Path) -> dict[str, Pair]:
    """Return the factors by the modules' names as in the file; every tensor is used."""
    modules: dict[str, dict[str, TensorRef]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if part not in _PARTS or not name.startswith("lora_"):
            raise AdapterError(
                f"tensor {key!r} in {file} is no part of a LoRA adapter, which has {', '.join(_PARTS)}",
                hint="DoRA, LoHa, LoKr and the others of LyCORIS are not read in this layout; convert it to peft's",
            )
        modules.setdefault(name, {})[part] = tensor
    found = {}
    for name, parts in modules.items():
        missing = [part for part in _PARTS[:2] if part not in parts]
        if missing:
            raise AdapterError(
                f"tensor '{name}.{missing[0]}' is missing in {file} ('{name}.{min(parts)}' is there)", hint=_AGAIN
            )
        a, b = parts["lora_down.weight"], parts["lora_up.weight"]
        check_pair(Pair(a, b, 1.0))
        found[name] = Pair(a, b, _scale(parts.get("alpha"), a.shape[0]))
    return found


def _scale(alpha: TensorRef | None, rank: int) -> float:
    if alpha is None:
        return 1.0
    value = alpha.read()
    number = float(value.reshape(-1)[0]) if value.size == 1 else math.nan
    if not 0 <= number < math.inf:
        raise AdapterError(
            f"tensor {alpha.key!r} in {alpha.file} is {value.tolist()!r}, not a number of 0 or more", hint=_AGAIN
        )
    return number / rank if number else 1.0
