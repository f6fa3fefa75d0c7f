"""What an adapter of AdapterHub really computes: the library's own forward on a copy of the base."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.adapters.hub_heads import resolve_head
from edgeadapt.adapters.hub_keys import CONTAINERS, FUSIONS, key_without
from edgeadapt.errors import MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.graft import follow_rows, owner_of, set_parameter, share
from edgeadapt.merging.quiet import quiet

NAME = "edgeadaptreference"
"""The name under which an adapter is loaded. The library writes it into parameters' names."""
_SHOWN = 5
_HINT = "the adapter's files do not belong together, or not to this base; save it again with save_adapter"


def hub_module(base: BaseModel, adapter: Adapter) -> nn.Module:
    """Return a copy of the base's module (over the same weights) with the adapter active, in eval mode.

    The head, which is the base's own with other numbers, is put in by hand: the library loads only a head that a model
    of the same class saved, and passes over any other in silence.

    Raises:
        MergeError: if the library is missing, does not know the base, or did not load the adapter completely.
    """
    library = _library()
    module = share(base.module)
    with quiet(), _calm():
        try:
            library.init(module, **_interface(adapter))
            _load(module, adapter)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MergeError(
                f"the library adapters cannot run adapter {adapter.name!r} on this base: {type(error).__name__}: "
                f"{reason}",
                hint="give the base that the adapter was trained on; `edgeadapt inspect` shows what the adapter wants",
            ) from error
    head = {key for key in adapter.tensors if _is_of_head(adapter, key)}
    _set_head(module, base, adapter, head)
    _prove_loaded(module, base, adapter, head)
    module.eval().requires_grad_(requires_grad=False)
    return module


def _load(model: Any, adapter: Adapter) -> None:
    """Load and activate an adapter, or each of a composition under the name that it was saved with."""
    options = {"with_head": False} if _has_heads(model) else {}
    parts = parts_of(adapter)
    for name, part in parts.items():
        safe = (Path(part.path) / "adapter.safetensors").is_file()
        _add_before(model, part, name)
        model.load_adapter(str(part.path), load_as=name, use_safetensors=safe, **options)
    if "setup" not in adapter.config:
        model.set_active_adapters(NAME)
        return
    from adapters.composition import AdapterCompositionBlock  # type: ignore[import-untyped]

    for fusion in adapter.config["fusions"].values():
        safe = (fusion["folder"] / "model_adapter_fusion.safetensors").is_file()
        model.load_adapter_fusion(str(fusion["folder"]), set_active=False, use_safetensors=safe, **options)
    model.set_active_adapters(AdapterCompositionBlock.from_dict(_saved(adapter.config["setup"])))


def _interface(adapter: Adapter) -> dict[str, Any]:
    """Return how the library is to look at a model that it knows through a plugin interface alone."""
    from adapters import AdapterModelInterface

    found = next((part.config["interface"] for part in parts_of(adapter).values() if "interface" in part.config), None)
    return {} if found is None else {"interface": AdapterModelInterface(**found)}


def parts_of(adapter: Adapter) -> dict[str, Adapter]:
    """Return the adapters that make up one, by the name that they are loaded under."""
    return dict(adapter.config["parts"]) if "setup" in adapter.config else {NAME: adapter}


def _saved(node: Any) -> dict[str, Any]:
    """Return a composition as the library saves it."""
    if isinstance(node, str):
        return {"type": "single", "children": [node]}
    return {**node, "children": [_saved(child) for child in node["children"]]}


@contextlib.contextmanager
def running(module: nn.Module) -> Iterator[None]:
    """Let single layers of a copy from `hub_module` run outside of the model's own forward."""
    from adapters import ForwardContext

    with quiet(), _calm(), torch.no_grad(), ForwardContext(module, torch.zeros((1, 1), dtype=torch.int64)):
        yield


def _library() -> Any:
    try:
        import adapters
    except ImportError as error:
        raise MergeError(
            "an adapter of AdapterHub is compared with the library that saved it, which is not installed: adapters",
            hint="pip install 'edgeadapt[adapterhub]'",
        ) from error
    return adapters


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keep the library from logging what is checked here."""
    logger = logging.getLogger("adapters")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _has_heads(module: nn.Module) -> bool:
    """Tell whether the library sees a model with a head: only then `load_adapter` knows of one."""
    from adapters import ModelWithHeadsAdaptersMixin

    return isinstance(module, ModelWithHeadsAdaptersMixin)


def _is_of_head(adapter: Adapter, key: str) -> bool:
    saved = adapter.config.get("modules_to_save", ())
    return key.rpartition(".")[0] in saved


def _add_before(model: Any, adapter: Adapter, name: str) -> None:
    """Make room for an adapter whose config the library would not load as it was in training.

    Stochastic depth does nothing after training, and the library would ask for torchvision. DiReFT is saved as NoReFT
    is: only its class of config says that it is not that.
    """
    from adapters import AdapterConfig, DiReftConfig

    settings = adapter.config["config"]
    if settings.get("stochastic_depth"):
        model.add_adapter(name, config=AdapterConfig.load({**settings, "stochastic_depth": 0.0}))
    elif settings.get("architecture") == "reft" and not settings.get("subtract_projection", True):
        own = {key: value for key, value in settings.items() if key != "subtract_projection"}
        model.add_adapter(name, config=DiReftConfig.from_dict(own))


def _set_head(module: nn.Module, base: BaseModel, adapter: Adapter, keys: set[str]) -> None:
    tensors = {key: adapter.tensors[key] for key in keys}
    for name, value in resolve_head(adapter, tensors, base.modules, base.name).items():
        owner, attribute = owner_of(module, name)
        old = owner._parameters[attribute]  # noqa: SLF001
        assert old is not None
        follow_rows(module, int(old.shape[0]), int(value.shape[0]))
        set_parameter(owner, attribute, torch.from_numpy(np.array(value)))


def _prove_loaded(module: nn.Module, base: BaseModel, adapter: Adapter, head: set[str]) -> None:
    """Check that every tensor of the file is in the model, with its value, and that no tensor is still fresh."""
    prefix = str(getattr(base.module, "base_model_prefix", "")) + "."
    names = [*parts_of(adapter), *adapter.config.get("fusions", ())]
    state = {}
    for key, value in module.state_dict().items():
        for name in names:
            if (short := key_without(name, key, (*CONTAINERS, FUSIONS))) is not None:
                state[short.removeprefix(prefix) + ("" if name == NAME else f"@{name}")] = value
            elif f".{NAME}." in key:
                state[key] = value
    saved = {key.removeprefix(prefix): tensor for key, tensor in adapter.tensors.items() if key not in head}
    absent, fresh = sorted(saved.keys() - state.keys()), sorted(state.keys() - saved.keys())
    wrong = [
        key
        for key in sorted(saved.keys() & state.keys())
        if not np.array_equal(state[key].detach().to(torch.float32).numpy(), saved[key].read())
    ]
    for names, problem in ((absent, "were not loaded"), (fresh, "are not in its file"), (wrong, "have other values")):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise MergeError(
                f"the library's copy of adapter {adapter.name!r} is not the saved one: {len(names)} tensors {problem}: "
                f"{', '.join(names[:_SHOWN])}{more}",
                hint=_HINT,
            )
