"""Which modules of a base an adapter changes: peft's matching of names, and names that moved between model classes.

Semantics of peft 0.21: `tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key` and `_set_trainable`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeadapt.errors import AdapterError


@dataclass(frozen=True)
class Move:
    """Where an adapter's module names lie in the base: what starts with `old` there starts with `new` here.

    `exact` are names that are the same in both. With `old` and `new` empty every name is.
    """

    old: str = ""
    new: str = ""
    exact: frozenset[str] = frozenset()

    def to_base(self, path: str) -> str:
        """Return the base's name for the adapter's module `path`."""
        if path in self.exact or not path.startswith(self.old):
            return path
        return self.new + path.removeprefix(self.old)

    def to_adapter(self, path: str) -> str | None:
        """Return the adapter's name for the base's module `path`, None if the adapter's model did not have it."""
        if path in self.exact:
            return path
        return self.old + path.removeprefix(self.new) if path.startswith(self.new) else None


def find_move(paths: Iterable[str], modules: Collection[str]) -> Move:
    """Return where the adapter's modules `paths` lie among the base's `modules`.

    A name that the base does not have is found by its suffix, if exactly one change of prefix (one that adds, drops
    or reorders the parts before it, and no number) brings all such names into the base.

    Raises:
        AdapterError: no change of prefix does, or several do.
    """
    paths = sorted(paths)
    exact = frozenset(path for path in paths if path in modules)
    strange = [path for path in paths if path not in exact]
    if not strange:
        return Move()
    found = {
        (move.old, move.new): move
        for base in modules
        if (move := _prefix_change(strange[0], base, exact)) is not None
        and all(path.startswith(move.old) and move.to_base(path) in modules for path in strange)
        and not {move.to_base(path) for path in strange} & exact
    }
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        near = difflib.get_close_matches(strange[0], modules, n=1, cutoff=0.0)
        raise AdapterError(
            f"the adapter changes module {strange[0]!r}, which the base does not have (its nearest is "
            f"{near[0] if near else None!r}); {len(paths) - len(strange)} of the adapter's {len(paths)} modules "
            "are there",
            hint="give the base that the adapter was trained on, loaded for the same task",
        )
    one, other = sorted(found.values(), key=lambda move: move.to_base(strange[0]))[:2]
    raise AdapterError(
        f"the adapter's module {strange[0]!r} can be {one.to_base(strange[0])!r} or {other.to_base(strange[0])!r} in "
        "the base",
        hint="give the base that the adapter was trained on, loaded for the same task",
    )


def _prefix_change(path: str, base: str, exact: frozenset[str]) -> Move | None:
    """Return the change of prefix that turns `path` into `base`, if it is one that moves of classes make."""
    here, there = path.split("."), base.split(".")
    same = 0
    while same < min(len(here), len(there)) and here[-1 - same] == there[-1 - same]:
        same += 1
    if same == 0:
        return None
    old, new = here[: len(here) - same], there[: len(there) - same]
    if any(part.isdigit() for part in (*old, *new)) or not (set(old) <= set(new) or set(new) <= set(old)):
        return None
    return Move("".join(f"{part}." for part in old), "".join(f"{part}." for part in new), exact)


def is_target(config: Mapping[str, Any], path: str) -> bool:
    """Tell whether target_modules and its companions select the module `path` (an adapter's name)."""
    excluded = config.get("exclude_modules")
    if excluded and _listed(excluded, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ()):
        return False
    targets = config["target_modules"]
    if isinstance(targets, str) or path in targets:
        return _listed(targets, path)
    return _listed(targets, path) and _in_layers(config, path)


def _listed(names: str | list[str], path: str) -> bool:
    """Tell whether `names` has `path`: as a regular expression for text, else as a name or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    """Tell whether layers_to_transform and layers_pattern allow `path`: its first layer number decides."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    if patterns:
        wanted = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
    else:
        wanted = [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in wanted if (match := re.match(pattern, path))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def is_saved(config: Mapping[str, Any], path: str) -> bool:
    """Tell whether modules_to_save holds the module `path` or one above it.

    peft compares ends of names without a dot: "classifier" also saves DistilBERT's "pre_classifier".
    """
    names = tuple(config.get("modules_to_save") or ())
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts) + 1)) if names else False


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first of `patterns` that matches the end of `path`, else `default`."""
    for pattern, value in (patterns or {}).items():
        if pattern_matches(pattern, path):
            return value
    return default


def pattern_matches(pattern: str, path: str) -> bool:
    """Tell whether a key of rank_pattern or alpha_pattern matches the module `path`."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def name_some(names: Collection[str], show: Callable[[str], str] = repr) -> str:
    """Return the first three of `names` and how many more there are."""
    first = ", ".join(show(name) for name in sorted(names)[:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")
