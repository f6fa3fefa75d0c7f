"""What an adapted model really computes: the saving library's own unmerged forward on the base in torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter, Array
from edgeadapt.errors import AdapterError, BaseModelError, MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.fingerprint import module_digest
from edgeadapt.merging.graft import follow_rows, set_parameter, share
from edgeadapt.merging.quiet import quiet
from edgeadapt.merging.virtual_tokens import load_virtual_tokens

# peft drops keys of an adapter whose name is also a segment of a module path ("1"), so ours can be none.
REFERENCE = "edgeadapt_reference"
"""The name under which an adapter is loaded into peft."""
_PREFIX = "base_model.model."
_NAMES_SHOWN = 5
# The layouts whose adapters peft computes: its own, and LoRA under other names.
_RUN_BY_PEFT = ("peft", "gguf", "kohya", "mlx", "onnx_adapter")
# These leave the base as it is; every other initialization ("pissa", "olora", ...) may rewrite its weights in place.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def reference_outputs(
    base: BaseModel, adapters: Sequence[Adapter], cases: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str | None, list[dict[str, Array]]]:
    """Return the outputs of the base (key None) and of each adapter (by name) for every case.

    Each adapter runs unmerged in the library that saved it, and every one of its tensors is proven to be in place. All
    this happens on a copy over the same weights; the base itself is not touched, which is verified.

    Args:
        base: the base; its module is left as it is.
        adapters: each at its own names; none twice.
        cases: keyword arguments of the forward.

    Raises:
        MergeError: if an adapter's library is unknown, or it did not load the adapter completely.
        BaseModelError: if the forward fails, or gives no tensor.
    """
    outputs: dict[str | None, list[dict[str, Array]]] = {
        None: [model_outputs(base, base.module, case) for case in cases]
    }
    for adapter in adapters:
        if adapter.name in outputs:
            raise MergeError(f"two adapters have the name {adapter.name!r}", hint="give each a name of its own")
        outputs[adapter.name] = adapter_outputs(base, adapter, cases)
    return outputs


def adapter_outputs(
    base: BaseModel, adapter: Adapter, cases: Sequence[Mapping[str, torch.Tensor]]
) -> list[dict[str, Array]]:
    """Return one adapter's outputs for every case; see `reference_outputs`."""
    touched = _touched(base, adapter)
    biases = bias_digests(base, touched)
    model = adapted_module(base, adapter)
    outputs = [model_outputs(base, model, case) for case in cases]
    check_untouched(base, adapter, touched, biases)
    return outputs


def adapted_module(base: BaseModel, adapter: Adapter) -> nn.Module:
    """Return a copy of the base's module (over the same weights) with the adapter inside, unmerged, in eval mode.

    Raises:
        MergeError: if the adapter's library is unknown, or it did not load the adapter completely.
    """
    if adapter.layout == "adapterhub":
        from edgeadapt.merging.adapterhub import hub_module

        return hub_module(base, adapter)
    if adapter.layout == "edgeadapt":
        from edgeadapt.merging.own_layout import own_module

        return own_module(base, adapter)
    if adapter.layout not in _RUN_BY_PEFT:
        raise MergeError(
            f"adapter {adapter.name!r} is in the layout {adapter.layout!r}, whose library cannot be run here",
            hint="only adapters saved by peft or AdapterHub have a reference",
        )
    with quiet():
        config = _from_library(adapter, "read", lambda: _peft_config(adapter))
        module = _own_weights(base) if _rewrites_base(config) else share(base.module)
        _own_saved_parameters(module, adapter)
        load = load_virtual_tokens if config.is_prompt_learning else _load
        model: Any = _from_library(adapter, "load", lambda: load(module, config, adapter, REFERENCE))
    if not config.is_prompt_learning:
        _prove_loaded(model, adapter)
        _choose_task(model, adapter)
    model.eval().requires_grad_(requires_grad=False)
    inner: nn.Module = model if config.is_prompt_learning else model.base_model
    return inner


def _peft_config(adapter: Adapter) -> Any:
    """Return peft's config of an adapter: as saved, or as read where another library saved it."""
    from peft import LoraConfig, PeftConfig

    if adapter.layout == "peft":
        return PeftConfig.from_pretrained(str(adapter.path))
    return LoraConfig(**{key: value for key, value in adapter.config.items() if key != "peft_type"})


def model_outputs(base: BaseModel, module: nn.Module, case: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Return the tensors that a forward gives, by output name, as float32 arrays (integers stay integers).

    Caches, nested outputs and tuples (hidden states) are left out.

    Raises:
        BaseModelError: if the forward fails, or gives no tensor.
    """
    return {name: array.copy() for name, array in output_views(base, module, case).items()}


def output_views(base: BaseModel, module: nn.Module, case: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Return `model_outputs` in the memory that the forward left them in: good until the module runs again."""
    arguments: dict[str, Any] = dict(case)
    if base.task in {"text-generation", "text2text-generation"} and "use_cache" not in arguments:
        arguments["use_cache"] = False
    try:
        with torch.no_grad():
            result = module(**arguments)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in case.items())
        raise BaseModelError(
            f"{base.name} cannot run on {shapes}: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            hint="give inputs that the model's forward takes",
        ) from error
    found = {name: _array(value) for name, value in _named(base, result) if isinstance(value, torch.Tensor)}
    if not found:
        raise BaseModelError(
            f"{base.name} returned a {type(result).__name__} without tensors",
            hint="the forward must return a tensor, a tuple or a mapping of tensors",
        )
    return found


def _named(base: BaseModel, result: Any) -> list[tuple[str, Any]]:
    if isinstance(result, Mapping):
        return [(str(name), value) for name, value in result.items() if name != "past_key_values"]
    values = list(result) if isinstance(result, (tuple, list)) else [result]
    names = base.output_names or (("output",) if len(values) == 1 else tuple(f"output_{i}" for i in range(len(values))))
    if len(names) != len(values):
        raise BaseModelError(
            f"{base.name} has {len(values)} outputs, but {len(names)} names: {', '.join(names)}",
            hint="give one output name for each output of the forward",
        )
    return list(zip(names, values, strict=True))


def _array(value: torch.Tensor) -> Array:
    value = value.detach().cpu()
    return (value.to(torch.float32) if value.is_floating_point() else value).numpy()


def _load(module: nn.Module, config: Any, adapter: Adapter, name: str) -> Any:
    """Return a PeftModel on `module`, loaded by peft's own reading where the keys are as peft writes them."""
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict

    if hasattr(config, "progressbar"):
        config.progressbar = False  # FRoD's own
    if all(ref.key == _spelled(key) for key, ref in adapter.tensors.items()):
        return PeftModel.from_pretrained(module, str(adapter.path), adapter_name=name, config=config)
    config.inference_mode = True
    model = get_peft_model(module, config, adapter_name=name)
    tensors = {_spelled(key): torch.from_numpy(np.array(ref.read())) for key, ref in adapter.tensors.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    return model


def _spelled(key: str) -> str:
    """Return a normalized key as peft writes it; what belongs to no module stands beside the model."""
    return key if key.startswith("base_model.") else _PREFIX + key


def _choose_task(model: nn.Module, adapter: Adapter) -> None:
    """Let the layers of an adapter for several tasks (Poly) mix what the one in hand mixes, for every row."""
    from peft.tuners.poly.layer import Linear

    task = adapter.task_id
    if task is None:
        return

    def give_task(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "task_ids": torch.full((len(args[0]),), task)}

    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(give_task, with_kwargs=True)


def _from_library(adapter: Adapter, verb: str, work: Any) -> Any:
    try:
        return work()
    except ImportError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MergeError(
            f"peft cannot {verb} adapter {adapter.name!r} here, a package is missing: {reason}",
            hint=f"install what it names ({error.name or 'see above'}), and export again",
        ) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MergeError(
            f"peft cannot {verb} adapter {adapter.name!r} on this base: {type(error).__name__}: {reason}",
            hint="give the base that the adapter was trained on; `edgeadapt inspect` shows what the adapter wants",
        ) from error


def _own_saved_parameters(module: nn.Module, adapter: Adapter) -> None:
    """Give each base parameter that the adapter saves whole memory of its own, in the adapter's shape.

    peft loads by writing into a parameter's memory, which the base shares. A head may have other classes. Parameters
    that are tied stay tied, as in the model that was trained.
    """
    for key, ref in adapter.tensors.items():
        path, _, attribute = key.replace(".base_layer.", ".").rpartition(".")
        try:
            old = module.get_submodule(path)._parameters.get(attribute)  # noqa: SLF001
        except AttributeError:
            continue
        if old is None:
            continue
        if tuple(old.shape[1:]) != tuple(ref.shape[1:]) or old.ndim != len(ref.shape):
            raise AdapterError(
                f"adapter {adapter.name!r}: {key} has shape {tuple(ref.shape)}, the base's has {tuple(old.shape)}",
                hint="give the base that the adapter was trained on",
            )
        fresh = old.detach().clone() if old.shape == torch.Size(ref.shape) else torch.zeros(tuple(ref.shape))
        follow_rows(module, int(old.shape[0]), int(ref.shape[0]))
        _exchange(module, old, fresh)


def _exchange(module: nn.Module, old: nn.Parameter, fresh: torch.Tensor) -> None:
    """Put `fresh` in the place of `old`, wherever that is used."""
    places = [
        (owner, attribute)
        for owner in module.modules()
        for attribute, parameter in owner._parameters.items()  # noqa: SLF001
        if parameter is old
    ]
    for owner, attribute in places:
        set_parameter(owner, attribute, fresh)
    first, name = places[0]
    for owner, attribute in places[1:]:
        owner._parameters[attribute] = first._parameters[name]  # noqa: SLF001


def _prove_loaded(model: nn.Module, adapter: Adapter) -> None:
    """Check that every tensor of the file is in the model, with its value, and that no tensor is still fresh."""
    from peft import get_peft_model_state_dict

    with quiet():
        own = get_peft_model_state_dict(model, adapter_name=REFERENCE, save_embedding_layers=False)
    own = {_canonical(key): value for key, value in own.items() if ".original_module." not in key}
    state = model.state_dict()
    present = {_canonical(key): value for key, value in state.items() if ".original_module." not in key} | own
    saved = {_canonical(key): ref for key, ref in adapter.tensors.items()}
    absent = sorted(saved.keys() - present.keys())
    fresh = sorted(own.keys() - saved.keys())
    wrong = [
        key
        for key in sorted(saved.keys() & present.keys())
        if not np.array_equal(_array(present[key]), saved[key].read())
    ]
    for names, problem in ((absent, "were not loaded"), (fresh, "are not in its file"), (wrong, "have other values")):
        if names:
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            raise MergeError(
                f"peft's copy of adapter {adapter.name!r} is not the saved one: {len(names)} tensors {problem}: "
                f"{', '.join(names[:_NAMES_SHOWN])}{more}",
                hint="the adapter's files do not belong together, or not to this base; save it again with peft",
            )


def _canonical(key: str) -> str:
    """Return one spelling for a tensor's key in a file and in a loaded model."""
    key = key.removeprefix(_PREFIX)
    key = key.replace(f".{REFERENCE}", "").replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    return re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", key)


def _rewrites_base(config: Any) -> bool:
    init = getattr(config, "init_lora_weights", True)
    return init not in _HARMLESS_INITS


def _own_weights(base: BaseModel) -> nn.Module:
    """Return a copy of the base with memory of its own."""
    copy = share(base.module)
    for parameter in copy.parameters():  # a tied one comes once
        parameter.data = parameter.data.clone()
    return copy


def bias_digests(base: BaseModel, paths: Iterable[str]) -> dict[str, str]:
    """Return the digests of the biases at the base's modules `paths`, by name."""
    names = [f"{path}.bias" for path in paths if base.modules[path].has_bias]
    return {name: module_digest(base.module.get_parameter(name)) for name in names}


def _touched(base: BaseModel, adapter: Adapter) -> list[str]:
    prefixes: set[str] = set()
    for key in adapter.tensors:
        parts = key.split(".")
        prefixes.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return [path for path in base.modules if path in prefixes]


def check_untouched(base: BaseModel, adapter: Adapter, paths: Iterable[str], biases: Mapping[str, str]) -> None:
    """Prove that the base's weights at the modules `paths`, and biases with known digests, are what they were.

    Raises:
        MergeError: if one is not.
    """
    before = {f"{path}.weight": base.modules[path].digest for path in paths} | dict(biases)
    for name, digest in before.items():
        if module_digest(base.module.get_parameter(name)) != digest:
            raise MergeError(
                f"running adapter {adapter.name!r} changed the base's {name}",
                hint="load the base again; please report the adapter's configuration as a bug",
            )
