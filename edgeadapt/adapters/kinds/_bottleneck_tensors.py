"""The tensors of AdapterHub's bottlenecks by place in the model: "<place>.adapters.<part>"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, TensorRef
from edgeadapt.adapters.hub_keys import is_of_head
from edgeadapt.adapters.kinds._bottleneck_config import block_of
from edgeadapt.adapters.kinds._invertible import check_invertible, is_invertible
from edgeadapt.errors import AdapterError

_KEY = re.compile(r"(?P<place>.+)\.adapters\.(?P<part>.+)")
_LAYER = re.compile(r"(?P<layer>.*\.(?P<index>\d+))\.(?P<location>[^\d]+)")
_AGAIN = "save the adapter again with save_adapter"


@dataclass(frozen=True)
class Place:
    """One bottleneck's tensors.

    layer: the layer's path in the model that was trained; index: its number there
    location: where in the layer ("output", "attention.output", "attention_adapters")
    parts: its tensors by name; shared: those that all places of the adapter share
    """

    layer: str
    index: int
    location: str
    parts: Mapping[str, TensorRef]
    shared: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The bottleneck's width."""
        if "adapter_up.weight" in self.parts:
            return self.parts["adapter_up.weight"].shape[1]
        for part, axis in (("adapter_up.W_left", 1), ("adapter_up.W", 1)):
            if part in self.parts:
                return self.parts[part].shape[0] * self.parts[part].shape[axis]
        name = "W_up_left" if "W_up_left" in self.shared else "W_up"
        return self.shared[name].shape[0] * self.shared[name].shape[1]


def is_of_config(settings: Mapping[str, Any], key: str) -> bool:
    """Tell whether a normalized key is of a bottleneck, or its shared or invertible part, that settings ask for."""
    if _is_shared(key):
        return bool(settings.get("phm_layer"))
    if is_invertible(key):
        return block_of(settings) is not None
    match = _KEY.fullmatch(key)
    place = None if match is None else _LAYER.fullmatch(match["place"])
    if place is None:
        return False
    flag = "mh_adapter" if "attention" in place["location"] else "output_adapter"
    return bool(settings.get(flag)) and int(place["index"]) not in (settings.get("leave_out") or ())


def _is_shared(key: str) -> bool:
    return "shared_parameters" in key.split(".")


def places_of(adapter: Adapter) -> dict[str, Place]:
    """Return the adapter's bottlenecks by place.

    Raises:
        AdapterError: a key names no layer.
    """
    shared = {key.rpartition(".")[2]: tensor for key, tensor in adapter.tensors.items() if _is_shared(key)}
    found: dict[str, dict[str, TensorRef]] = {}
    for key, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            found.setdefault(match["place"], {})[match["part"]] = tensor
    places = {}
    for place, parts in found.items():
        match = _LAYER.fullmatch(place)
        if match is None:
            raise AdapterError(
                f"tensor {next(iter(parts.values())).key!r} in {_file(adapter)} names no layer", hint=_AGAIN
            )
        places[place] = Place(match["layer"], int(match["index"]), match["location"], parts, shared)
    return places


def check_parts(adapter: Adapter) -> tuple[str, ...]:
    """Check that every bottleneck has the tensors that the config asks for, and no others.

    Raises:
        AdapterError: a tensor is missing, unknown, empty, or of integers.
    """
    places = places_of(adapter)
    if not places:
        raise AdapterError(f"{_file(adapter)} holds no bottleneck", hint=_AGAIN)
    for key, tensor in adapter.tensors.items():
        if 0 in tensor.shape or not tensor.dtype.startswith(("F", "BF")):
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} is {tensor.dtype}{list(tensor.shape)}, not floating point "
                "numbers",
                hint=_AGAIN,
            )
        if not (_KEY.fullmatch(key) or _is_shared(key) or is_invertible(key) or is_of_head(key)):
            raise AdapterError(f"tensor {tensor.key!r} in {tensor.file} is of no bottleneck", hint=_AGAIN)
        if key.startswith("heads.") and "head" not in adapter.config:
            raise AdapterError(f"tensor {tensor.key!r} in {tensor.file} is of a head without a config", hint=_AGAIN)
    check_invertible(adapter)
    wanted, shared = _wanted(adapter)
    for name, place in places.items():
        _compare(adapter, f"{name}.adapters", wanted, place.parts)
    _compare(adapter, "shared_parameters", shared, next(iter(places.values())).shared)
    return ()


def _wanted(adapter: Adapter) -> tuple[set[str], set[str]]:
    """Return the parts of each bottleneck, and those that all share."""
    settings = adapter.config["config"]
    linear = 1 if settings.get("ln_before") else 0
    wanted = {f"adapter_norm_before.{part}" for part in ("weight", "bias") if linear}
    wanted |= {f"adapter_down.0.{part}" for part in ("weight", "bias") if linear}
    if isinstance(settings.get("scaling"), str):
        wanted.add("scaling")
    down, up = f"adapter_down.{linear}.", "adapter_up."
    if not settings.get("phm_layer"):
        return wanted | {f"{side}{part}" for side in (down, up) for part in ("weight", "bias")}, set()
    own: set[str] = set()
    shared: set[str] = set()
    rule = {"phm_rule_left", "phm_rule_right"} if settings.get("factorized_phm_rule") else {"phm_rule"}
    (shared if settings.get("shared_phm_rule", True) else own).update(rule)
    ends = ("_left", "_right") if settings.get("factorized_phm_W", True) else ("",)
    if settings.get("shared_W_phm"):
        shared |= {f"W_{side}{end}" for side in ("down", "up") for end in ends}
    else:
        own |= {f"W{end}" for end in ends}
    if settings.get("phm_bias", True):
        own.add("b")
    return wanted | {f"{side}{part}" for side in (down, up) for part in own}, shared


def _compare(adapter: Adapter, where: str, wanted: set[str], found: Mapping[str, TensorRef]) -> None:
    if missing := wanted - found.keys():
        raise AdapterError(f"tensor '{where}.{min(missing)}' is missing in {_file(adapter)}", hint=_AGAIN)
    if extra := found.keys() - wanted:
        raise AdapterError(f"tensor {found[min(extra)].key!r} in {_file(adapter)} does not fit its config", hint=_AGAIN)


def matrix(place: Place, side: str, part: str, settings: Mapping[str, object]) -> tuple[Array, Array | None]:
    """Return one side's float32[in, out] and its bias float32[out] or None, Kronecker sums written out.

    Args:
        place: the bottleneck.
        side: "down" or "up".
        part: the side's name in keys ("adapter_down.0").
        settings: the adapter's.
    """
    parts = place.parts
    if not settings.get("phm_layer"):
        return parts[f"{part}.weight"].read().T, parts[f"{part}.bias"].read()

    def read(name: str, shared_name: str) -> Array:
        own = parts.get(f"{part}.{name}")
        return own.read() if own is not None else place.shared[shared_name].read()

    def product(name: str, shared_name: str, *, factorized: object) -> Array:
        if not factorized:
            return read(name, shared_name)
        left, right = (read(f"{name}_{end}", f"{shared_name}_{end}") for end in ("left", "right"))
        return np.asarray(left @ right)

    rules = product("phm_rule", "phm_rule", factorized=settings.get("factorized_phm_rule"))
    weights = product("W", f"W_{side}", factorized=settings.get("factorized_phm_W", True))
    whole = np.sum([np.kron(rule, weight) for rule, weight in zip(rules, weights, strict=True)], axis=0)
    bias = parts.get(f"{part}.b")
    return whole.astype(np.float32), None if bias is None else bias.read()


def _file(adapter: Adapter) -> str:
    return str(next(iter(adapter.tensors.values())).file)
