"""What the kinds in edgeadapt's own layout share: settings by name, parts at modules, heads that are saved whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Array, Bottleneck, Branch, ResolvedAdapter, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import base_label, check_digest
from edgeadapt.errors import AdapterError

_ALWAYS = frozenset(
    {
        *("edgeadapt_type", "base_model_name_or_path", "revision", "task_type"),
        *("modules", "modules_to_save"),
    }
)
_WRITE = "see docs/formats/adapter-folder.md for what the kind takes"


@dataclass(frozen=True)
class Setting:
    """One setting of a kind: whether a value is allowed, what it must be in words, and its default (None: needed)."""

    fits: Callable[[Any], bool]
    words: str
    default: Any = None


def number(words: str, fits: Callable[[float], bool], default: Any = None) -> Setting:
    """Return a setting that is a finite number."""
    return Setting(
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and fits(float(value))
        ),
        words,
        default,
    )


def whole(words: str, least: int, default: Any = None) -> Setting:
    """Return a setting that is a whole number of at least `least`."""
    return Setting(lambda value: type(value) is int and value >= least, words, default)


def choice(values: Collection[str], default: Any = None) -> Setting:
    """Return a setting that is one of a few words."""
    return Setting(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}", default)


def flag(default: bool) -> Setting:
    """Return a setting that is true or false."""
    return Setting(lambda value: isinstance(value, bool), "true or false", default)


def check_settings(config: Mapping[str, Any], known: Mapping[str, Setting]) -> tuple[str, ...]:
    """Return warnings about a config: none.

    Raises:
        AdapterError: a key is unknown or missing, or a value out of range.
    """
    if unknown := sorted(config.keys() - _ALWAYS - known.keys()):
        raise AdapterError(
            f"{unknown[0]} is {config[unknown[0]]!r}, a setting that {config['edgeadapt_type']} does not have",
            hint=_WRITE,
        )
    for key, needed in (("modules", True), ("modules_to_save", False)):
        value = config.get(key, None if needed else [])
        if not isinstance(value, list) or (needed and not value) or not all(isinstance(x, str) and x for x in value):
            raise AdapterError(f"{key} is {value!r}, not a list of module paths", hint=_WRITE)
        if len(set(value)) < len(value):
            raise AdapterError(f"{key} names a module twice: {value}", hint=_WRITE)
    for key, setting in known.items():
        value = setting_of(config, known, key)
        if not setting.fits(value):
            raise AdapterError(f"{key} is {value!r}, must be {setting.words}", hint=_WRITE)
    return ()


def setting_of(config: Mapping[str, Any], known: Mapping[str, Setting], key: str) -> Any:
    """Return a setting's value or its default."""
    return config.get(key, known[key].default)


def check_parts(adapter: Adapter, wanted: Mapping[str, int]) -> tuple[str, ...]:
    """Return warnings: none; every module has the parts `wanted` (their numbers of axes by name), and none else.

    Raises:
        AdapterError: a tensor is missing, unknown, empty, of integers, or has another number of axes.
    """
    return check_axes(
        adapter, {f"{path}.{name}": axes for path in adapter.config["modules"] for name, axes in wanted.items()}
    )


def check_axes(adapter: Adapter, expected: Mapping[str, int]) -> tuple[str, ...]:
    """Return warnings: none; there are the tensors `expected` (their numbers of axes), modules saved whole, none else.

    Raises:
        AdapterError: a tensor is missing, unknown, empty, of integers, or has another number of axes.
    """
    for key, tensor in adapter.tensors.items():
        if 0 in tensor.shape or not tensor.dtype.startswith(("F", "BF")):
            raise _broken(adapter, f"tensor {key!r} is {tensor.dtype}{list(tensor.shape)}, not numbers")
    _check_keys(adapter, set(expected))
    for key, axes in expected.items():
        if len(adapter.tensors[key].shape) != axes:
            raise _broken(adapter, f"tensor {key!r} has the shape {list(adapter.tensors[key].shape)}, not {axes} axes")
    return ()


def _check_keys(adapter: Adapter, expected: set[str]) -> None:
    """Check that there is a tensor for each expected key and each saved module, and no other."""
    saved = [key for key in adapter.tensors if _is_saved(adapter, key)]
    if missing := sorted(expected - adapter.tensors.keys()):
        raise _broken(adapter, f"tensor {missing[0]!r} is missing")
    if extra := sorted(adapter.tensors.keys() - expected - set(saved)):
        raise _broken(adapter, f"tensor {extra[0]!r} is no part of a {adapter.kind} at its modules")
    for module in adapter.config.get("modules_to_save", []):
        if f"{module}.weight" not in saved:
            raise _broken(adapter, f"tensor '{module}.weight' of modules_to_save is missing")


def _is_saved(adapter: Adapter, key: str) -> bool:
    module, _, part = key.rpartition(".")
    return module in adapter.config.get("modules_to_save", []) and part in ("weight", "bias")


def part(adapter: Adapter, module: str, name: str) -> TensorRef:
    """Return one part at a module."""
    return adapter.tensors[f"{module}.{name}"]


def check_shape(adapter: Adapter, module: str, name: str, shape: tuple[int, ...]) -> None:
    """Check one part's shape.

    Raises:
        AdapterError: it is another.
    """
    found = part(adapter, module, name).shape
    if found != shape:
        raise AdapterError(
            f"tensor '{module}.{name}' has the shape {list(found)}, the base's module and the other parts need "
            f"{list(shape)}",
            hint="the adapter's files do not belong together, or give the base that the adapter was trained on",
        )


def module_at(
    adapter: Adapter, path: str, modules: Mapping[str, TargetModule], types: Collection[str], base_name: str | None
) -> TargetModule:
    """Return the base's module at `path`, its digest checked.

    Raises:
        AdapterError: there is none, or it is of another type or with another weight than in training.
    """
    module = modules.get(path)
    if module is None:
        raise AdapterError(
            f"the adapter names module {path!r}, which {base_label(base_name)} does not have",
            hint="give the base that the adapter was trained on, loaded for the same task",
        )
    if module.type not in types:
        raise AdapterError(
            f"module {path!r} is of type {module.type}, and a {adapter.kind} goes beside {' or '.join(types)}",
            hint="name another module in adapter_config.json",
        )
    check_digest(adapter.base, (path,), module, base_name)
    return module


def resolved(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None,
    *,
    bottlenecks: tuple[Bottleneck, ...] = (),
    branches: tuple[Branch, ...] = (),
) -> ResolvedAdapter:
    """Return the adapter with its networks and the modules that it saves whole.

    Raises:
        AdapterError: a saved module is not in the base, or has other axes there.
    """
    replaced: dict[str, Array] = {}
    for key in sorted(key for key in adapter.tensors if _is_saved(adapter, key)):
        path, _, name = key.rpartition(".")
        module = modules.get(path)
        value = adapter.tensors[key].read()
        rest = (module.weight_shape[1:] if name == "weight" else ()) if module is not None else None
        if module is None or value.shape[1:] != rest or (name == "bias" and not module.has_bias):
            raise AdapterError(
                f"tensor {key!r} of modules_to_save has the shape {list(value.shape)}, and {base_label(base_name)} has "
                f"{'no such module' if module is None else f'{list(module.weight_shape)} there'}",
                hint="give the base that the adapter was trained on, loaded for the same task",
            )
        replaced[key] = value
    return ResolvedAdapter(adapter.name, adapter.kind, {}, replaced, bottlenecks=bottlenecks, branches=branches)


def described(adapter: Adapter, reason: str, **facts: Any) -> dict[str, Any]:
    """Return what `describe` of a kind gives."""
    return {
        **facts,
        "places": list(adapter.config["modules"]),
        "modules_to_save": list(adapter.config.get("modules_to_save", [])),
        "merge": {"exact": False, "reason": reason},
        "swap": {"possible": True, "reason": "a small network beside the module"},
        "needs_base_weights": False,
    }


def _broken(adapter: Adapter, what: str) -> AdapterError:
    return AdapterError(
        f"{what} in {next(iter(adapter.tensors.values())).file}", hint="save the adapter again where it was trained"
    )
