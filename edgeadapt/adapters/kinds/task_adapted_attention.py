"""Task-Adapted Attention (Bhattacharjee et al., arXiv 2308.12372): Swin for many tasks, in edgeadapt's own layout.

softmax(q k^T + A'(w_t)) v: to the scores of a window's tokens, in all heads, comes a matrix that a task's embedding w_t
makes of a learned one by FiLM, ((1 + gamma(w_t)) A + beta(w_t)) in blocks on the diagonal. Task-scaled norms scale
their gain by FiLM too. A task is one adapter: what it makes of the embedding is worked out when it is resolved. Names
of tensors are those of the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, Branch, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.kinds._own import (
    Setting,
    check_axes,
    check_settings,
    check_shape,
    described,
    module_at,
    part,
    resolved,
    setting_of,
)
from edgeadapt.errors import AdapterError

TERMS: frozenset[str] = frozenset()
_ATTENTION, _OUTPUT = ".self", ".output.dense"
_FILM, _NORM_FILM = "taa_attn.gb_weights", "ln_weight_modulation.gb_weights"
_EMBEDDINGS = "task_type_embeddings"


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) and x for x in value) and len(set(value)) == len(value)


SETTINGS = {
    "tasks": Setting(lambda value: _are_names(value) and value != [], "a list of the tasks' names, in their order"),
    "norms": Setting(_are_names, "a list of paths of norms", []),
}


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "task_adapted_attention"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`: none.

    Raises:
        AdapterError: a setting is unknown, missing or out of range, or a norm is saved twice.
    """
    warnings = check_settings(config, SETTINGS)
    for path in config["modules"]:
        if not path.endswith(_ATTENTION):
            raise AdapterError(
                f"{path!r} of modules is no attention of Swin's", hint="name modules such as ...blocks.0.attention.self"
            )
    if twice := set(setting_of(config, SETTINGS, "norms")) & set(config.get("modules_to_save", [])):
        raise AdapterError(
            f"{min(twice)!r} is in norms and in modules_to_save", hint="name a norm that tasks scale in norms alone"
        )
    return warnings


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors: none.

    Raises:
        AdapterError: a tensor is missing, unknown or of a wrong kind.
    """
    expected = {f"{_EMBEDDINGS}.weight": 2}
    for path in adapter.config["modules"]:
        expected |= {f"{path}.random_weight_matrix": 2, f"{path}.{_FILM}.weight": 2, f"{path}.{_FILM}.bias": 1}
    for path in setting_of(adapter.config, SETTINGS, "norms"):
        expected |= {f"{path}.weight": 1, f"{path}.bias": 1}
        expected |= {f"{path}.{_NORM_FILM}.weight": 2, f"{path}.{_NORM_FILM}.bias": 1}
    return check_axes(adapter, expected)


def expand(adapter: Adapter) -> tuple[Adapter, ...]:
    """Return the adapters in one file: one for each task.

    Raises:
        AdapterError: there is not one embedding for each.
    """
    tasks = adapter.config["tasks"]
    check_shape(adapter, _EMBEDDINGS, "weight", (len(tasks), part(adapter, _EMBEDDINGS, "weight").shape[1]))
    if len(tasks) == 1:
        return (dataclasses.replace(adapter, task_id=0),)
    return tuple(
        dataclasses.replace(adapter, name=f"{adapter.name}-{task}", task_id=index) for index, task in enumerate(tasks)
    )


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return one task's adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a module is not in the base or of another type, or a shape does not fit.
    """
    branches = []
    for path in adapter.config["modules"]:
        site = path.removesuffix(_ATTENTION) + _OUTPUT
        module_at(adapter, site, modules, ("linear",), base_name)
        bias = _scores(adapter, path)
        branches.append(Branch(site, "scores", {"adds": "scores", "tokens": len(bias)}, {"bias": bias}))
    norms: dict[str, Array] = {}
    for path in setting_of(adapter.config, SETTINGS, "norms"):
        module = module_at(adapter, path, modules, ("norm",), base_name)
        norms |= _norm(adapter, path, module.out_features)
    found = resolved(adapter, modules, base_name, branches=tuple(branches))
    return dataclasses.replace(found, replaced={**found.replaced, **norms})


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    tokens = {part(adapter, path, "random_weight_matrix").shape[0] for path in adapter.config["modules"]}
    return described(
        adapter,
        "what it adds to an attention's scores is no change of a weight",
        tokens_of_a_window={"min": min(tokens), "max": max(tokens)},
        **{key: setting_of(adapter.config, SETTINGS, key) for key in SETTINGS},
    )


def _film(adapter: Adapter, path: str, name: str, features: int) -> tuple[Array, Array]:
    """Return (gamma, beta), float64[features], of the adapter's task."""
    embeddings = part(adapter, _EMBEDDINGS, "weight").read().astype(np.float64)
    check_shape(adapter, path, f"{name}.weight", (2 * features, embeddings.shape[1]))
    check_shape(adapter, path, f"{name}.bias", (2 * features,))
    weight, bias = (part(adapter, path, f"{name}.{which}").read().astype(np.float64) for which in ("weight", "bias"))
    gamma, beta = np.split(weight @ embeddings[adapter.task_id or 0] + bias, 2)
    return gamma, beta


def _scores(adapter: Adapter, path: str) -> Array:
    """Return what is added to the scores, float32[tokens, tokens]: blocks of rows become blocks on the diagonal."""
    tokens = part(adapter, path, "random_weight_matrix").shape[0]
    size = part(adapter, _EMBEDDINGS, "weight").shape[1]
    if size < tokens:
        raise AdapterError(
            f"the tasks' embeddings have {size} numbers, fewer than a window of {path!r} has tokens ({tokens})",
            hint="the adapter's files do not belong together",
        )
    width = -(-tokens // (size // tokens))
    check_shape(adapter, path, "random_weight_matrix", (tokens, width))
    gamma, beta = _film(adapter, path, _FILM, width)
    rows = (1 + gamma) * part(adapter, path, "random_weight_matrix").read() + beta
    result = np.zeros((tokens, tokens), np.float32)
    for start in range(0, tokens, width):
        block = result[start : start + width, start : start + width]
        block[:] = rows[start : start + width, : block.shape[1]]
    return result


def _norm(adapter: Adapter, path: str, features: int) -> dict[str, Array]:
    """Return a norm's parameters for the task: the gain is scaled and shifted, the bias is as trained."""
    for which in ("weight", "bias"):
        check_shape(adapter, path, which, (features,))
    gamma, beta = _film(adapter, path, _NORM_FILM, features)
    gain = (1 + gamma) * part(adapter, path, "weight").read() + beta
    return {f"{path}.weight": gain.astype(np.float32), f"{path}.bias": part(adapter, path, "bias").read()}
