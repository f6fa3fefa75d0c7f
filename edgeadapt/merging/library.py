"""peft itself on the base in torch: what an adapter computes, read off peft's own forward instead of from a formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter, Array, Effective, TargetModule
from edgeadapt.errors import AdapterError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.past import past_of
from edgeadapt.merging.probe import NotAProductError, probe
from edgeadapt.merging.quiet import quiet
from edgeadapt.merging.reference import REFERENCE, adapted_module, bias_digests, check_untouched

_NO_WAY = "merge the adapter with peft, check the result, and use it as a base"


class PeftLibrary:
    """peft at work on one base; see `edgeadapt.adapters.adapter.Library`."""

    def __init__(self, base: BaseModel) -> None:
        """Load nothing yet."""
        self._base = base

    def effective(self, adapter: Adapter) -> Mapping[str, Effective]:
        """Return every module of the base that computes something else with the adapter inside, by its path.

        Raises:
            AdapterError: if a layer's forward is no product, or the adapter changes what is no weight or bias.
            MergeError: if peft cannot load the adapter, or did not load all of it.
        """
        _check_keys(adapter)
        biases = bias_digests(self._base, self._base.modules)
        model: Any = adapted_module(self._base, adapter).model
        found = {}
        with quiet():
            for path, target in self._base.modules.items():
                now = _effective(_inside(model, path), target, self._base.module.get_submodule(path), adapter)
                if now is not None:
                    found[path] = now
        _check_covered(model, self._base)
        check_untouched(self._base, adapter, found, biases)
        for path, now in found.items():
            if not (np.isfinite(now.weight).all() and (now.bias is None or np.isfinite(now.bias).all())):
                raise AdapterError(
                    f"it makes the weight or bias of module {path!r} infinite or NaN",
                    hint="the training diverged: use another checkpoint",
                )
        return found

    def past(self, adapter: Adapter) -> tuple[tuple[Array, Array], ...]:
        """Return the key and value that the adapter puts before each layer's own, float32[heads, tokens, dim].

        Raises:
            AdapterError: if the base is no decoder-only language model, or the adapter is for one of another shape.
            MergeError: if peft cannot load it, or the base with these keys and values is not what peft computes.
        """
        return past_of(self._base, adapter)


def _check_keys(adapter: Adapter) -> None:
    """Refuse config entries that this version of peft does not know and would leave out."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    known = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.config["peft_type"])].__dataclass_fields__
    for key in sorted(adapter.config.keys() - known.keys()):
        value = adapter.config[key]
        if value not in (None, False, [], {}, ""):
            raise AdapterError(
                f"unknown key {key!r} is set to {value!r} in adapter_config.json (saved by peft "
                f"{adapter.config.get('peft_version') or 'of an unknown version'}): it may change what is computed",
                hint="update peft, or remove the key if it has no effect after training",
            )


def _inside(model: nn.Module, path: str) -> nn.Module:
    """Return what stands at the base's `path` in an adapted model, whose wrappers lie between the names."""
    module = model
    for part in path.split("."):
        while not hasattr(module, part):
            module = _unwrapped(module)
        module = getattr(module, part)
    return module


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what a wrapper of peft wraps: the adapter's own copy, or the base's layer."""
    for copies in ("modules_to_save", "ln_tuning_layers"):
        if hasattr(module, copies):
            own: nn.Module = getattr(module, copies)[REFERENCE]
            return own
    inner: nn.Module = module.base_layer  # type: ignore[assignment]
    return inner


def _effective(layer: nn.Module, target: TargetModule, plain: nn.Module, adapter: Adapter) -> Effective | None:
    """Return what a layer of an adapted model computes with, None if that is what the base's module does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = hasattr(layer, "modules_to_save") or hasattr(layer, "ln_tuning_layers")
    if isinstance(layer, BaseTunerLayer) and not whole:
        try:
            return probe(layer, target, plain)
        except NotAProductError:
            raise AdapterError(
                f"{adapter.config['peft_type']} at module {target.path!r} depends on its input in another way than a "
                "product: its change is no weight",
                hint=_NO_WAY,
            ) from None
    own = _unwrapped(layer) if whole else layer
    if all(_same(own, plain, name) for name in ("weight", "bias")):
        return None
    bias = _parameter(own, "bias")
    weight = _parameter(own, "weight")
    assert weight is not None
    return Effective(weight.numpy().copy(), None if bias is None else bias.numpy().copy())


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    found = module._parameters.get(name)  # noqa: SLF001 - an attribute could be a method
    return None if found is None else found.detach().to(torch.float32).cpu()


def _same(one: nn.Module, other: nn.Module, name: str) -> bool:
    a, b = _parameter(one, name), _parameter(other, name)
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _check_covered(model: nn.Module, base: BaseModel) -> None:
    """Refuse saved copies of modules that hold more than weights and biases: nothing else can be exchanged."""
    for path, module in model.named_modules():
        copies: Any = getattr(module, "modules_to_save", None)
        if copies is None:
            continue
        own: nn.Module = copies[REFERENCE]
        for name, value in own.state_dict().items():
            place = f"{path}.{name}"
            if place.rpartition(".")[0] in base.modules and name.rpartition(".")[2] in ("weight", "bias"):
                continue
            if not torch.equal(value, _state(base.module, place)):
                raise AdapterError(
                    f"it saves {place!r}, which is no weight or bias of a module",
                    hint="leave the module out of modules_to_save and train again",
                )


def _state(module: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), attribute)
    return found
