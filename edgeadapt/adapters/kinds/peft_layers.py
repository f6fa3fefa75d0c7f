"""Every other type of peft 0.21 that changes weights, read off peft's own forward on the float base.

A module's unmerged forward is affine in its input, so f(0) and f(I) say all that an adapter does there: no formula of a
type, no random numbers and no singular vectors are computed again anywhere else. `KINDS` names the types; the export
proves for every module that its forward is such a product, and that peft holds every tensor of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.from_library import resolve_from_library
from edgeadapt.errors import AdapterError

TERMS: frozenset[str] = frozenset()
_LOW = "a low-rank term beside each module"
_FULL = "its change has full rank: at each token it costs as much as the base's own layer, until it is merged"
_GAIN = (
    "a gain per output, or per input (feed-forward modules); at a convolution's inputs a term as large as the base's"
)
_BIAS = "an offset per output"
_ROWS = "a term for the changed rows of the embedding"
_WHOLE = "its parameters in place of the base's"


@dataclass(frozen=True)
class _Type:
    """A type of peft: what it is, and what it costs beside the base."""

    summary: str
    cost: str


_TYPES: Mapping[str, _Type] = {
    "adalora": _Type("AdaLoRA: low rank with singular values, pruned in training", _LOW),
    "adamss": _Type("AdaMSS: low rank in subspaces of the weight", _LOW),
    "beft": _Type("BEFT: trained biases", _BIAS),
    "boft": _Type("BOFT: inputs rotated by a butterfly of blocks", _FULL),
    "c3a": _Type("C3A: circular convolutions in blocks", _FULL),
    "deft": _Type("DEFT: a part of the weight's range replaced", _LOW),
    "delora": _Type("DeLoRA: low rank with its strength apart from its direction", _LOW),
    "fourierft": _Type("FourierFT: few frequencies of the change", _FULL),
    "frod": _Type("FRoD: sparse rotations in a basis that layers share", _FULL),
    "glora": _Type("GLoRA: weight and bias scaled and shifted by low ranks", _FULL),
    "gralora": _Type("GraLoRA: low rank in each block of the weight", _LOW),
    "hira": _Type("HiRA: the weight times a low rank, element by element", _FULL),
    "hra": _Type("HRA: inputs reflected by Householder vectors", _LOW),
    "ia3": _Type("IA3: outputs or inputs rescaled", _GAIN),
    "ln_tuning": _Type("LN tuning: trained norms", _WHOLE),
    "loha": _Type("LoHa: two low ranks multiplied element by element", _LOW),
    "lokr": _Type("LoKr: Kronecker product of small factors", _LOW),
    "miss": _Type("MiSS (Bone): sums of inputs through a small matrix", _LOW),
    "oft": _Type("OFT: blocks of inputs rotated", _FULL),
    "osf": _Type("OSF: the weight's small singular values and vectors trained", _FULL),
    "peanut": _Type("PEANuT: a small network over the weight", _LOW),
    "poly": _Type("Poly (Polytropon, MHR): low ranks that each task mixes in its own way, an adapter for each", _LOW),
    "psoft": _Type("PSOFT: the weight's main subspace rotated", _LOW),
    "pvera": _Type("PVeRA: VeRA with a distribution, at its mean", _LOW),
    "randlora": _Type("RandLoRA: a sum of random bases", _FULL),
    "road": _Type("RoAd: pairs of outputs rotated and scaled", _FULL),
    "shira": _Type("SHiRA: few entries of the weight changed", _FULL),
    "supertuning": _Type("SuperTuning: few entries of the weight changed", _FULL),
    "tinylora": _Type("TinyLoRA: a handful of numbers over the weight's singular vectors", _LOW),
    "trainable_tokens": _Type("Trainable tokens: single rows of the embedding", _ROWS),
    "unilora": _Type("UniLoRA: low rank, indexed from one vector", _LOW),
    "vblora": _Type("VB-LoRA: low rank, mixed from a bank of vectors", _LOW),
    "vera": _Type("VeRA: random projections that layers share, scaled", _LOW),
    "waveft": _Type("WaveFT: few wavelets of the change", _FULL),
}
_POLY, _ROUTER = "poly", "poly_router.module_logits"
KINDS: Mapping[str, str] = {name: kind.summary for name, kind in _TYPES.items()}

_LORA = "train LoRA, or another type of `edgeadapt list kinds`"
REFUSED: Mapping[str, tuple[str, str]] = {
    "adaption_prompt": (
        "LLaMA-Adapter adds a gated attention to learned tokens in each layer: that is no product with a weight",
        "train prefix tuning, which the key-value cache holds, or LoRA",
    ),
    "lily": (
        "Lily's router looks at the whole batch: what one text gives depends on the texts beside it",
        _LORA,
    ),
    "shadow": (
        "Shadow runs a second network beside the base's layers: its change is no weight",
        _LORA,
    ),
    "xlora": (
        "X-LoRA runs the model twice to weigh its LoRA adapters for each token, and peft saves only a part of it",
        "export its LoRA adapters one by one: a bundle swaps and blends them",
    ),
}
_SIGNS = (
    "it is read with singular vectors of the base's weights, which are computed again: if another machine trained it, "
    "their signs may be others, and so is the adapter then (in peft too)"
)


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of one of these kinds, or of one that is refused."""
    return layout == "peft" and (kind_of(config) in _TYPES or kind_of(config) in REFUSED)


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name: peft's own, in lower case."""
    return str(config.get("peft_type")).lower()


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`. Its keys are checked by the library, which knows them.

    Raises:
        AdapterError: the type is refused, or set to draw random numbers at each run.
    """
    kind = kind_of(config)
    if kind in REFUSED:
        reason, hint = REFUSED[kind]
        raise AdapterError(f"peft_type {config['peft_type']!r} cannot be exported: {reason}", hint=hint)
    if config.get("sample_at_inference"):
        raise AdapterError(
            "sample_at_inference is true: it draws random numbers at each run, so no output is the right one",
            hint="set it to false: the adapter is then used at its mean",
        )
    signs = kind == "psoft" or (kind == "frod" and not config.get("save_projection", True))
    return (_SIGNS,) if signs else ()


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: there are none, or one is empty.
    """
    if not adapter.tensors:
        raise AdapterError(
            f"{adapter.path} holds no tensor of its {kind_of(adapter.config)} adapter",
            hint="save the adapter again with peft's save_pretrained",
        )
    for tensor in adapter.tensors.values():
        if 0 in tensor.shape:
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} is empty (shape {list(tensor.shape)}): a shard of a "
                "partitioned training was saved, not the whole",
                hint="gather the shards before saving (ZeRO-3: deepspeed.zero.GatheredParameters; FSDP: "
                "summon_full_params), or convert the checkpoint",
            )
    if adapter.kind == _POLY:
        _check_tasks(adapter)
    return ()


def _check_tasks(adapter: Adapter) -> None:
    """Check that every router of Poly knows as many tasks as the config says."""
    tasks = adapter.config.get("n_tasks", 1)
    for key, tensor in adapter.tensors.items():
        if key.endswith(_ROUTER) and (type(tasks) is not int or tensor.shape[0] != tasks):
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} is for {tensor.shape[0]} tasks, and n_tasks is {tasks!r}",
                hint="copy the adapter_config.json that was saved with these tensors",
            )
    if not any(key.endswith(_ROUTER) for key in adapter.tensors):
        file = next(iter(adapter.tensors.values())).file
        raise AdapterError(
            f"{file} holds no {_ROUTER}: nothing says how a task mixes the adapter's skills",
            hint="save the adapter again with peft's save_pretrained",
        )


def expand(adapter: Adapter) -> tuple[Adapter, ...]:
    """Return the adapters in one file: one for each task of Poly."""
    if adapter.kind != _POLY:
        return (adapter,)
    tasks = int(adapter.config.get("n_tasks", 1))
    if tasks == 1:
        return (replace(adapter, task_id=0),)
    return tuple(replace(adapter, name=f"{adapter.name}-task{task}", task_id=task) for task in range(tasks))


def resolve(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None, library: Library | None
) -> ResolvedAdapter:
    """Return the adapter as the cheapest updates that give what peft's own forward computes.

    Raises:
        AdapterError: there is no library, the base is another one, a value is not finite, or nothing changes.
    """
    return resolve_from_library(adapter, modules, base_name, library)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    kind, targets = _TYPES[adapter.kind], adapter.config.get("target_modules")
    return {
        "variant": kind.summary,
        "rank": adapter.config.get("r"),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "modules_to_save": sorted(adapter.config.get("modules_to_save") or ()),
        "merge": {"exact": True, "reason": "each module's forward is a product, which folds into its weight and bias"},
        "swap": {"possible": True, "reason": kind.cost},
        "needs_base_weights": True,
        **({} if adapter.task_id is None else {"task_id": adapter.task_id}),
    }
