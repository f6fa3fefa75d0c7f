"""A LoRA adapter against a base: every selected module has its tensors, every tensor has its use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, ResolvedAdapter, SiteUpdate, TargetModule, TensorRef
from edgeadapt.adapters.base_copy import is_base_copy
from edgeadapt.adapters.fingerprint import base_label, check_digest, check_unrounded, trained_on
from edgeadapt.adapters.kinds._lora_tensors import factor_keys, split_keys
from edgeadapt.adapters.low_rank import Factors, expected_shapes, scaling_of, site_update
from edgeadapt.adapters.selection import Move, find_move, is_saved, is_target, name_some, pattern_value
from edgeadapt.errors import AdapterError

_LAYERS = ("linear", "conv1d", "conv2d", "embedding")
_RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"
_DAMAGED = "the file is damaged or incomplete: save the adapter again with peft's save_pretrained"
# The output layer, which peft's "all-linear" leaves out; a saved config holds names instead, so this is a fallback.
_OUTPUT_LAYERS = ("lm_head", "embed_out", "output_projection", "proj_out", "score", "classifier", "decoder")


@dataclass
class _Work:
    """One resolution under way. `left` holds the tensors without a use yet, by the adapter's module name and part."""

    adapter: Adapter
    modules: Mapping[str, TargetModule]
    base_name: str | None
    move: Move
    left: dict[str, dict[str, TensorRef]]
    factors: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, Array] = field(default_factory=dict)
    replaced: dict[str, Array] = field(default_factory=dict)

    def names(self) -> dict[str, str]:
        """Return the adapter's name of each of the base's modules that its own model had."""
        named = ((path, self.move.to_adapter(path)) for path in self.modules)
        return {path: name for path, name in named if name is not None}

    def take(self, name: str, part: str) -> TensorRef | None:
        """Return a tensor and note that it is used."""
        return self.left.get(name, {}).pop(part, None)

    def both_bases(self) -> str:
        return f"the adapter was trained on {trained_on(self.adapter.base)}, this is {base_label(self.base_name)}"


def resolve_lora(adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None) -> ResolvedAdapter:
    """Return the adapter as arrays at `modules`; see `edgeadapt.adapters.resolve`."""
    left = split_keys(adapter.tensors)
    changed = [name for name, parts in left.items() if factor_keys(parts)]
    work = _Work(adapter, modules, base_name, find_move(changed, modules), left)
    _prove_selection(work, {work.move.to_base(name) for name in changed})
    check_unrounded(adapter.base, work.names(), modules, base_name)
    for name in changed:
        _take_factors(work, name)
    _take_saved(work)
    _take_biases(work)
    _take_embeddings(work)
    _refuse_left(work)
    sites = {path: _site(work, path) for path in sorted({*work.factors, *work.biases})}
    return ResolvedAdapter(
        name=adapter.name,
        kind=adapter.kind,
        sites={path: site for path, site in sites.items() if _acts(site)},
        replaced=dict(sorted(work.replaced.items())),
    )


def _prove_selection(work: _Work, present: set[str]) -> None:
    """Check that the modules with tensors are those that the config selects in the base."""
    config = work.adapter.config
    selected, allowed = _selected(work)
    if not selected:
        raise AdapterError(
            f"target_modules {config['target_modules']!r} selects no module of {base_label(work.base_name)}",
            hint=_RIGHT_BASE,
        )
    if missing := selected - present:
        raise AdapterError(
            f"no tensors for {len(missing)} of the {len(selected)} modules that target_modules selects: "
            f"{name_some(missing)} ({work.both_bases()})",
            hint=_DAMAGED + ", or " + _RIGHT_BASE,
        )
    if extra := present - selected - allowed:
        raise AdapterError(
            f"tensors for modules that the config does not select: {name_some(extra)}",
            hint="copy the adapter_config.json that was saved with these tensors",
        )


def _selected(work: _Work) -> tuple[set[str], set[str]]:
    """Return the modules that must have tensors, and those that may."""
    config, names = work.adapter.config, work.names()
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = {path for path in names if work.modules[path].type in ("linear", "conv1d")}
        linear = {path for path in linear if is_target({**config, "target_modules": ".*"}, names[path])}
        heads = {path for path in linear if path.split(".")[-1] in _OUTPUT_LAYERS}
        return linear - heads, heads
    selected = {path for path, name in names.items() if is_target(config, name)}
    return selected, _tied(work, selected) if config.get("ensure_weight_tying") else set()


def _tied(work: _Work, paths: set[str]) -> set[str]:
    """Return the modules that share their weight with an embedding in `paths`."""
    digests = {work.modules[path].digest for path in paths if work.modules[path].type == "embedding"}
    return {path for path, module in work.modules.items() if module.digest in digests}


def _take_factors(work: _Work, name: str) -> None:
    """Take one module's factors, and the copy of its base weight that peft saves with an embedding."""
    path = work.move.to_base(name)
    module = work.modules[path]
    _check_layer(module)
    check_digest(work.adapter.base, (path, name), module, work.base_name)
    prefix = "lora_embedding_" if module.type == "embedding" else "lora_"
    suffix = "" if module.type == "embedding" else ".weight"
    a, b = (work.take(name, f"{prefix}{term}{suffix}") for term in "AB")
    if a is None or b is None:
        raise AdapterError(
            f"the tensors of module {name!r} are {name_some(work.left[name])}, which do not fit module {path!r} of "
            f"{base_label(work.base_name)}, a {module.class_name}; {work.both_bases()}",
            hint=_RIGHT_BASE,
        )
    _check_shapes(work, module, a, b)
    rank = _rank(work, name, a)
    alpha = float(pattern_value(work.adapter.config.get("alpha_pattern"), name, work.adapter.config["lora_alpha"]))
    work.factors[path] = Factors(
        a=a.read(),
        b=b.read(),
        scaling=scaling_of(alpha, rank, rank_stabilized=bool(work.adapter.config.get("use_rslora"))),
        magnitude=_vector(work, module, work.take(name, "lora_magnitude_vector")),
        bias=_vector(work, module, work.take(name, "lora_B.bias")),
    )
    copy = work.take(name, "base_layer.weight")
    if copy is not None and not is_base_copy(copy, module):
        raise AdapterError(
            f"tensor {copy.key!r}, the base's own weight as the adapter saw it (shape {list(copy.shape)}), is not "
            f"'{path}.weight' of {base_label(work.base_name)} (shape {list(module.weight_shape)}); {work.both_bases()}",
            hint=_RIGHT_BASE,
        )


def _check_layer(module: TargetModule) -> None:
    if module.type not in _LAYERS:
        raise AdapterError(
            f"module {module.path!r} is a {module.class_name}; LoRA is known for {', '.join(_LAYERS)} modules",
            hint="exclude the module and train again",
        )
    if module.type == "embedding" and "Scaled" in module.class_name and module.output_scale is None:
        raise AdapterError(
            f"embedding {module.path!r} is a {module.class_name}, and its scale is not known", hint="pass --base"
        )


def _check_shapes(work: _Work, module: TargetModule, a: TensorRef, b: TensorRef) -> None:
    wanted = expected_shapes(module, a.shape[0])
    for tensor, shape in zip((a, b), wanted, strict=True):
        if tensor.shape != shape:
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} has shape {list(tensor.shape)}, but module {module.path!r} of "
                f"{base_label(work.base_name)} (a {module.class_name} with weight {list(module.weight_shape)}) needs "
                f"{list(shape)}; {work.both_bases()}",
                hint=_RIGHT_BASE,
            )


def _rank(work: _Work, name: str, a: TensorRef) -> int:
    """Return the module's rank, on which config and tensor must agree."""
    config = work.adapter.config
    rank = int(pattern_value(config.get("rank_pattern"), name, config["r"]))
    if rank != a.shape[0]:
        raise AdapterError(
            f"tensor {a.key!r} has rank {a.shape[0]}, but the config says {rank} for module {name!r}",
            hint="copy the adapter_config.json that was saved with these tensors",
        )
    return rank


def _vector(work: _Work, module: TargetModule, tensor: TensorRef | None) -> Array | None:
    """Return one number per output feature, float32[out]."""
    if tensor is None:
        return None
    wanted = expected_shapes(module, module.groups)[1][0] if module.type in _LAYERS else module.out_features
    if int(np.prod(tensor.shape)) != wanted:
        raise AdapterError(
            f"tensor {tensor.key!r} in {tensor.file} has shape {list(tensor.shape)}, but module {module.path!r} of "
            f"{base_label(work.base_name)} has {wanted} output features; {work.both_bases()}",
            hint=_RIGHT_BASE,
        )
    return tensor.read().reshape(wanted)


def _take_saved(work: _Work) -> None:
    """Take the modules that were trained whole (modules_to_save)."""
    for path, name in work.names().items():
        if not is_saved(work.adapter.config, name) or path in work.factors:
            continue
        module = work.modules[path]
        for part in ("weight", "bias") if module.has_bias else ("weight",):
            tensor = work.take(name, part)
            if tensor is None:
                raise AdapterError(
                    f"modules_to_save saves module {path!r} of {base_label(work.base_name)}, and tensor "
                    f"'{name}.{part}' is missing",
                    hint=_DAMAGED + ", or " + _RIGHT_BASE,
                )
            work.replaced[f"{path}.{part}"] = _replacement(work, module, part, tensor)
        rows = [len(work.replaced[key]) for key in (f"{path}.weight", f"{path}.bias") if key in work.replaced]
        if module.type == "linear" and len(set(rows)) > 1:
            raise AdapterError(
                f"the head {name!r} has {rows[0]} outputs by its weight and {rows[1]} by its bias", hint=_DAMAGED
            )


def _replacement(work: _Work, module: TargetModule, part: str, tensor: TensorRef) -> Array:
    """Return a parameter's new value; a head may have another number of outputs than the base's."""
    wanted = module.weight_shape if part == "weight" else (module.weight_shape[0],)
    if part == "bias" and module.type == "conv1d":
        wanted = (module.weight_shape[1],)
    head = module.type == "linear" and not _is_vocabulary(work, module)
    if tensor.shape[head:] != wanted[head:] or len(tensor.shape) != len(wanted):
        grown = _is_vocabulary(work, module) and tensor.shape[0] > wanted[0] and tensor.shape[1:] == wanted[1:]
        added = f" (it was trained with {tensor.shape[0] - wanted[0]} tokens more)" if grown else ""
        raise AdapterError(
            f"tensor {tensor.key!r} in {tensor.file} has shape {list(tensor.shape)}, but '{module.path}.{part}' of "
            f"{base_label(work.base_name)} has {list(wanted)}{added}; {work.both_bases()}",
            hint="resize the base's embeddings as in training and save it as a base" if grown else _RIGHT_BASE,
        )
    return tensor.read().astype(np.float32, copy=False)


def _is_vocabulary(work: _Work, module: TargetModule) -> bool:
    """Tell whether a module is an embedding or has one row per token, like a language model's head."""
    embeddings = [other.weight_shape for other in work.modules.values() if other.type == "embedding"]
    return module.type == "embedding" or module.weight_shape == max(embeddings, default=None)


def _take_biases(work: _Work) -> None:
    """Take the base's own biases that were trained (bias="all" or "lora_only")."""
    for name in list(work.left):
        for part in ("base_layer.bias", "bias"):
            path = work.move.to_base(name)
            if part in work.left[name] and path in work.modules and work.modules[path].has_bias:
                tensor = work.left[name].pop(part)
                _take_bias(work, path, name, tensor)
    for name in list(work.left):
        _take_tied_bias(work, name)
    trained = work.adapter.config.get("bias", "none")
    wanted = set(work.names()) if trained == "all" else set(work.factors) if trained == "lora_only" else set()
    missing = {
        path
        for path in wanted
        if work.modules[path].has_bias and path not in work.biases and f"{path}.bias" not in work.replaced
    }
    if missing:
        raise AdapterError(
            f"bias is {trained!r}, but trained biases are missing, those of {name_some(missing)}",
            hint=_DAMAGED + ", or " + _RIGHT_BASE,
        )


def _take_bias(work: _Work, path: str, name: str, tensor: TensorRef) -> None:
    module = work.modules[path]
    value = _vector(work, module, tensor)
    assert value is not None
    if work.adapter.config.get("bias", "none") == "none":
        # peft copies a targeted head's bias into the file beside its weight: then it is the base's own
        if module.bias is not None and not np.array_equal(module.bias(), value):
            raise AdapterError(
                f"tensor {tensor.key!r} is not the bias of {base_label(work.base_name)}, although bias is 'none'; "
                f"{work.both_bases()}",
                hint=_RIGHT_BASE,
            )
        return
    if module.type == "other":
        work.replaced[f"{path}.bias"] = value
        return
    check_digest(work.adapter.base, (path, name), module, work.base_name)
    work.biases[path] = value


def _take_tied_bias(work: _Work, name: str) -> None:
    """Take a second name of a bias in use (BERT's cls.predictions.bias is its decoder's bias)."""
    tensor = work.left[name].get("bias")
    if tensor is None or work.adapter.config.get("bias") != "all":
        return
    path = work.move.to_base(name)
    below = [value for other, value in work.biases.items() if other.startswith(f"{path}.")]
    if path not in work.modules and any(np.array_equal(tensor.read(), value) for value in below):
        del work.left[name]["bias"]


def _take_embeddings(work: _Work) -> None:
    """Take whole embeddings and heads that peft saves by itself: resized ones, and ones tied to a saved one."""
    for name, parts in work.left.items():
        module = work.modules.get(work.move.to_base(name))
        if module is None or "weight" not in parts or not _is_vocabulary(work, module):
            continue
        tensor = parts.pop("weight")
        value = _replacement(work, module, "weight", tensor)
        if not is_base_copy(tensor, module):
            work.replaced[f"{module.path}.weight"] = value


def _refuse_left(work: _Work) -> None:
    left = {tensor.key: name for name, parts in work.left.items() for tensor in parts.values()}
    if not left:
        return
    first = min(left)
    path = work.move.to_base(left[first])
    known = f"module {path!r} is there" if path in work.modules else f"it has no module {path!r}"
    raise AdapterError(
        f"tensors without a use in {base_label(work.base_name)}: {name_some(left)} ({known}; {work.both_bases()})",
        hint=_RIGHT_BASE,
    )


def _site(work: _Work, path: str) -> SiteUpdate:
    return site_update(work.modules[path], work.factors.get(path), work.biases.get(path))


def _acts(site: SiteUpdate) -> bool:
    return bool(site.terms)
