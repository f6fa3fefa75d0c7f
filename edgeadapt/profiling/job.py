"""A job: a folder that holds all a device needs to measure a bundle; `device_side/runner.py` reads it.

```
job.json               what to open, what to feed, how much to run
tensors.safetensors    the arrays that job.json names
model/...              model files as the runtime wants them
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.workload import Workload, example_inputs
from edgeadapt.runtime import open_session
from edgeadapt.runtime.spec import decoder_spec

Array = NDArray[Any]

SCHEMA = "edgeadapt.job/1"
_SWAPS = 10


@dataclass(frozen=True)
class Shapes:
    """Lengths for runtimes whose graphs are of fixed shapes.

    prompt_tokens: the longest prompt, or the length of a text; total_tokens: with what is written after it
    prompt_lengths: every length of a prompt
    """

    batch_size: int
    prompt_tokens: int
    total_tokens: int
    prompt_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Models:
    """What a runtime made of a bundle, in a job's folder.

    files: "plain", and "slots" where there are adapters, to paths in the folder
    options: what the engine wants to know; it refuses what it does not
    adapters: arrays by name of input for each adapter, where they are not those of the bundle's graphs
    defaults: what adapters' inputs hold that an adapter does not fill, where the graphs do not say it themselves
    notes: what a reader of the figures must know
    """

    files: Mapping[str, str]
    options: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Array]] | None = None
    defaults: Mapping[str, Array] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Tensors:
    """Arrays with a name each, for one file."""

    arrays: dict[str, Array] = field(default_factory=dict)

    def add(self, arrays: Mapping[str, Array]) -> dict[str, str]:
        """Return names of arrays in the file, by the names given."""
        names = {}
        for name, value in arrays.items():
            key = f"{len(self.arrays)}:{name}"
            self.arrays[key] = np.asarray(value, order="C")  # ascontiguousarray makes a scalar one of one axis
            names[name] = key
        return names


def write_job(
    folder: Path,
    bundle: Bundle,
    models: Models,
    workload: Workload,
    *,
    engine: str,
    active: str | None,
    tax_adapter: str | None,
    through_session: bool = False,
) -> dict[str, Any]:
    """Write job.json and tensors.safetensors, and return what job.json says.

    Args:
        folder: of the job; the models are there.
        bundle: what is measured.
        models: what the runtime made of it.
        workload: how much is run.
        engine: the file in device_side/engines.
        active: the adapter of the main figures, None for the base.
        tax_adapter: the adapter whose cost is measured, None for none.
        through_session: the engine is edgeadapt's own session, which knows more kinds of models and adapters than a
            graph with inputs.

    Raises:
        ProfileError: if the workload does not fit the model, or only edgeadapt's own session can run it.
    """
    spec = decoder_spec(bundle.manifest)
    _check_fits(bundle, spec, workload, active, tax_adapter)
    if not through_session:
        check_plain(bundle, spec)
    tensors = _Tensors()
    job: dict[str, Any] = {
        "schema": SCHEMA,
        "engine": engine,
        "options": dict(models.options),
        "models": dict(models.files),
        "adapters": {
            name: {} if through_session else tensors.add(_inputs_of(bundle, models, name))
            for name in bundle.adapter_names
        },
        "defaults": tensors.add(models.defaults or {}),
        "decoder": None if spec is None else _decoder(bundle, spec),
        "checks": _checks(bundle, tensors),
        "inputs": _timed_inputs(bundle, spec, workload, tensors),
        "answers": sorted(_answers(bundle)),
        "workload": {
            "prompt_tokens": list(workload.prompt_tokens),
            "new_tokens": workload.new_tokens,
            "repeats": workload.repeats,
            "batch_size": workload.batch_size,
            "swaps": _SWAPS,
        },
        "active": active,
        "tax_adapter": tax_adapter,
        "others": [name for name in bundle.adapter_names if name != active],
        "notes": list(models.notes),
    }
    save_file(tensors.arrays, folder / "tensors.safetensors")
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return job


def _check_fits(
    bundle: Bundle, spec: DecoderSpec | None, workload: Workload, active: str | None, tax_adapter: str | None
) -> None:
    if spec is None:
        return
    records = [record for name, record in bundle.manifest.adapters.items() if name in (active, tax_adapter)]
    room = spec.max_length - max((record.prefix_tokens for record in records), default=0)
    read = len(spec.decoder_start_token_ids) if "encoder" in bundle.manifest.graphs else max(workload.prompt_tokens)
    if read + workload.new_tokens > room:
        raise ProfileError(
            f"{read} tokens and {workload.new_tokens} new ones do not fit: this model holds {room} tokens",
            hint="choose a shorter prompt or fewer new tokens",
        )


def check_plain(bundle: Bundle, spec: DecoderSpec | None) -> None:
    """Refuse what more than a graph with inputs is needed for.

    Raises:
        ProfileError: naming the graphs, the adapter or the cache.
    """
    if len(bundle.manifest.graphs) > 1:
        raise ProfileError(
            f"{bundle.manifest.name} has the graphs {', '.join(sorted(bundle.manifest.graphs))}; this runtime measures "
            "bundles of one graph",
            hint="measure it with --runtime session",
        )
    for name in bundle.adapter_names:
        if bundle.adapter_record(name).prefix_tokens:
            raise ProfileError(
                f"adapter {name!r} is a prefix of the key-value cache, which this runtime's measurement does not write",
                hint="measure it with --runtime session, or a copy of the bundle without it (edgeadapt remove)",
            )
    if spec is not None and not spec.shared_cache:
        raise ProfileError(
            "this decoder's key-value cache grows by concatenation, which this runtime's measurement does not follow",
            hint="measure it with --runtime session",
        )


def _inputs_of(bundle: Bundle, models: Models, name: str) -> Mapping[str, Array]:
    if models.adapters is not None:
        return models.adapters[name]
    return {key: value for key, value in bundle.graph_tensors(name).items() if not is_prefix_tensor(key)}


def _decoder(bundle: Bundle, spec: DecoderSpec) -> dict[str, Any]:
    return {
        "cache": [{"past": f"past_key_values.{name}", "present": f"present.{name}"} for name in spec.cache_names],
        "heads": spec.cache_heads,
        "head_dim": spec.cache_head_dim,
        "dtype": spec.cache_dtype,
        "max_length": spec.max_length,
        "vocab_size": spec.vocab_size,
        "shared": spec.shared_cache,
        "logits_from": "logits_from" in bundle.manifest.graphs["decoder"].inputs,
        "start_ids": list(spec.decoder_start_token_ids) if "encoder" in bundle.manifest.graphs else None,
    }


def _checks(bundle: Bundle, tensors: _Tensors) -> list[dict[str, Any]]:
    """Return the goldens' inputs and outputs: of the base once, and of each adapter."""
    if "encoder" in bundle.manifest.graphs or {"image", "text"} & set(bundle.manifest.graphs):
        return []  # goldens of several graphs together are `edgeadapt verify`'s business
    found: list[dict[str, Any]] = []
    for name in bundle.adapter_names:
        golden = bundle.golden(name)
        inputs = tensors.add(golden.inputs)
        if not found:
            found.append({"adapter": None, "inputs": inputs, "outputs": tensors.add(golden.base)})
        found.append({"adapter": name, "inputs": inputs, "outputs": tensors.add(golden.adapted)})
    return found


def _timed_inputs(bundle: Bundle, spec: DecoderSpec | None, workload: Workload, tensors: _Tensors) -> dict[str, str]:
    """Return what a single pass, or an encoder, reads."""
    if spec is not None and "encoder" not in bundle.manifest.graphs:
        return {}
    with open_session(bundle, threads=1, keep_graphs=False) as session:
        return tensors.add(example_inputs(session, None if spec is None else "encoder", workload))


def _answers(bundle: Bundle) -> set[str]:
    """Return the graphs' outputs but those that adapters' branches give beside the model's answers."""
    beside = {name for slot in bundle.manifest.branches for name in slot.outputs.values()}
    return {name for graph in bundle.manifest.graphs.values() for name in graph.outputs} - beside
