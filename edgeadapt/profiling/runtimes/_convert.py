"""A bundle for a runtime that reads no ONNX: its graphs with fixed shapes, converted in the runtime's own Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.fields import to_mapping
from edgeadapt.profiling.job import Models, Shapes, check_plain
from edgeadapt.profiling.workload import Workload, example_inputs
from edgeadapt.runtime import open_session
from edgeadapt.runtime.spec import decoder_spec

Array = NDArray[Any]
_DEVICE_SIDE = Path(__file__).parents[1] / "device_side"
_CODES = ("int8", "int4")
_ROUNDED = "the bundle's {} weights were rounded again, to int8 with one scale per output channel"

_Adapters = Mapping[str, Mapping[str, Array]]
_Make = Callable[..., dict[str, Any]]
"""Converts models, and returns what was made by their names."""


@dataclass(frozen=True)
class Runtime:
    """A runtime that is converted for; a runtime's file takes `require`, `interpreter` and `prepare` from here.

    name: its file in device_side/convert
    modules: what its Python must have
    install: the command that brings them
    programs: each adapter is a model of its own beside the base's, with its tensors in it; else adapters are inputs
    """

    name: str
    modules: tuple[str, ...]
    install: str
    programs: bool = False

    @property
    def variable(self) -> str:
        """The environment variable that names its Python."""
        return f"EDGEADAPT_{self.name.upper()}_PYTHON"

    def require(self, device: Device) -> None:
        """Check that the device computes on its CPU, and that there is a Python here that converts.

        Raises:
            ProfileError: saying what is missing.
        """
        if device.provider != "cpu":
            raise ProfileError(f"{self.name} runs on the CPU here, not on {device.provider!r}", hint="known: cpu")
        self.python(device)

    def interpreter(self) -> str | None:
        """Return the Python that runs it on this machine, if its variable names one."""
        return os.environ.get(self.variable)

    def python(self, device: Device) -> str:
        """Return the Python that converts: the device's, if that is this machine, the variable's, or this one.

        Raises:
            ProfileError: if the one that was named, or this one, lacks a module.
        """
        named = device.interpreter if device.transport == "local" else None
        python = named or self.interpreter() or sys.executable
        missing = _missing(python, self.modules)
        if missing is not None:
            raise ProfileError(
                f"{self.name}: {python} {missing}",
                hint=f"{self.install}; or let {self.variable} name a Python that has " + " and ".join(self.modules),
            )
        return python

    def made_for(self, device: Device, shapes: Shapes) -> dict[str, Any]:  # noqa: ARG002 - the same for all devices
        """Return what the models depend on: their shapes."""
        return {"shapes": to_mapping(shapes)}

    def prepare(self, bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:
        """Convert a bundle into `folder/model` and return what was made.

        The precision is the bundle's kind: float32, or, where its weights are codes, int8 per channel.

        Raises:
            ProfileError: if the bundle is of a kind that has no such form, or the conversion fails.
        """
        check_plain(bundle, decoder_spec(bundle.manifest))
        (record,) = bundle.manifest.graphs.values()
        adapters = {name: bundle.graph_tensors(name) for name in bundle.adapter_names} if record.slots else {}
        scheme = str(bundle.manifest.quantization.get("scheme"))
        precision = "int8" if scheme in _CODES else "float32"
        notes = (_ROUNDED.format(scheme),) if precision == "int8" else ()
        place = folder / "model"
        place.mkdir(exist_ok=True)

        def made(models: Mapping[str, Any], **more: Any) -> dict[str, Any]:
            request = {"models": models, "output": str(place.resolve()), "precision": precision, **more}
            found: dict[str, Any] = run(self.python(device), self, request)["models"]
            return found

        found = (_with_programs if self.programs else _with_inputs)(bundle, shapes, adapters, place, made)
        return replace(found, options={"threads": device.threads, **found.options}, notes=(*found.notes, *notes))


@cache
def _missing(python: str, modules: tuple[str, ...]) -> str | None:
    code = f"import importlib.util as u; print(*[m for m in {list(modules)} if u.find_spec(m) is None])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    if done.returncode != 0:
        return f"does not run as Python: {done.stderr.strip()[-200:]}"
    return f"has no {done.stdout.split()[0]}" if done.stdout.strip() else None


def _with_inputs(bundle: Bundle, shapes: Shapes, adapters: _Adapters, place: Path, made: _Make) -> Models:
    """Convert two models, without and with inputs for adapters."""
    fed = _shapes_of(bundle, adapters)
    models = {"plain": _model(bundle, shapes)}
    if adapters:
        models["slots"] = _model(bundle, shapes, fed)
    found = made(models, defaults={name: list(shape) for name, shape in fed.items()})
    return Models(
        {form: f"model/{model['files'][0]}" for form, model in found.items()},
        {"signatures": _signatures_of(found), "defaults": "model/defaults.npz"},
        _padded(adapters, fed, place / "defaults.npz") if adapters else None,
        notes=("converted with fixed shapes; adapters are inputs, padded to the largest rank among this bundle's",),
    )


def _with_programs(bundle: Bundle, shapes: Shapes, adapters: _Adapters, place: Path, made: _Make) -> Models:
    """Convert the base and each adapter: models whose files are their own and one of the base's weights."""
    models = {"plain": _model(bundle, shapes)}
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as scratch:
        for number, (name, arrays) in enumerate(adapters.items()):
            held = Path(scratch) / f"{number}.npz"
            np.savez(held, allow_pickle=False, **arrays)
            models[f"adapter.{name}"] = _model(bundle, shapes, {}) | {"held": str(held)}
        found = made(models)
    _, data = found["plain"]["files"]
    sizes = {name: (place / name).stat().st_size for name in (data, *(model["files"][0] for model in found.values()))}
    return Models(
        {form: f"model/{model['files'][0]}" for form, model in found.items()},
        {"signatures": _signatures_of(found), "data": f"model/{data}"},
        {name: {} for name in adapters} or None,
        notes=(
            f"converted with fixed shapes; the base's weights are in {data}, which all programs share, an adapter's "
            "in its own program: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()),
        ),
    )


def _model(bundle: Bundle, shapes: Shapes, fed: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """Return what a conversion is asked for: of the plain graph, or of that with slots, `fed` its inputs for them."""
    (record,) = bundle.manifest.graphs.values()
    file = record.plain if fed is None else record.slots
    assert file is not None  # a bundle with adapters has it
    return {"graph": str(bundle.file(file).resolve()), "signatures": _signatures(bundle, shapes, fed or {})}


def _signatures_of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {form: model["signatures"] for form, model in found.items()}


def run(python: str, runtime: Runtime, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a conversion in another Python and return its answer.

    Raises:
        ProfileError: with what the converter said.
    """
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [python, "-m", f"convert.{runtime.name}", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(_DEVICE_SIDE)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if not lines:
        last = " | ".join(done.stderr.strip().splitlines()[-5:])
        raise ProfileError(
            f"the conversion for {runtime.name} ended with {done.returncode}: {last}",
            hint="if it was killed, the machine may have too little memory; else please report this",
        )
    reply = json.loads(lines[-1])
    if "error" in reply:
        raise ProfileError(f"{runtime.name}: {reply['error']['message']}", hint=reply["error"]["hint"])
    result: dict[str, Any] = reply["result"]
    return result


def _shapes_of(bundle: Bundle, adapters: _Adapters) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input that an adapter sets: large enough for all of them.

    Raises:
        ProfileError: if adapters replace a parameter by ones of different shapes, which no padding makes equal.
    """
    fixed = {slot.input: slot.parameter for slot in bundle.manifest.parameters}
    found: dict[str, tuple[int, ...]] = {}
    for name, inputs in adapters.items():
        for key, value in inputs.items():
            before = found.get(key, value.shape)
            if key in fixed and before != value.shape:
                raise ProfileError(
                    f"adapter {name!r} has {fixed[key]} of the shape {list(value.shape)}, another one of "
                    f"{list(before)}, and this runtime's models have fixed shapes",
                    hint="profile a copy of the bundle with one of them (edgeadapt remove), or another runtime",
                )
            found[key] = tuple(int(size) for size in np.maximum(before, value.shape))
    return found


def _padded(adapters: _Adapters, shapes: Mapping[str, tuple[int, ...]], defaults: Path) -> dict[str, dict[str, Array]]:
    """Return adapters with all inputs: zeros beyond their own rank, and what stands for none where they set nothing."""
    with np.load(defaults) as neutral:
        return {
            name: {key: _grown(inputs[key], shape) if key in inputs else neutral[key] for key, shape in shapes.items()}
            for name, inputs in adapters.items()
        }


def _grown(value: Array, shape: Sequence[int]) -> Array:
    return np.pad(value, [(0, want - have) for have, want in zip(value.shape, shape, strict=True)])


def _signatures(bundle: Bundle, shapes: Shapes, fed: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    adapters = {name: _tensor("float32", shape) for name, shape in fed.items()}
    spec = decoder_spec(bundle.manifest)
    if spec is None:
        return {
            f"run_{place}": {
                "inputs": {**{name: _tensor(a.dtype.name, a.shape) for name, a in inputs.items()}, **adapters},
                "fixed": {},
            }
            for place, inputs in enumerate(_passes(bundle, shapes))
        }
    if spec.cache_dtype != "float32":
        raise ProfileError(
            "this decoder holds its key-value cache in int8, which this runtime does not know",
            hint="export without --kv-cache int8, or profile with --runtime onnxruntime",
        )
    rows = shapes.batch_size
    checked = [bundle.golden(name).inputs["input_ids"].shape[1] for name in bundle.adapter_names]
    room = max([shapes.total_tokens, *checked])
    cache = [f"past_key_values.{name}" for name in spec.cache_names]
    place = {"logits_from": _tensor("int64", [1])}

    def kept(length: int) -> dict[str, Any]:
        return {name: _tensor("float32", [rows, spec.cache_heads, length, spec.cache_head_dim]) for name in cache}

    found = {
        f"prefill_{width}": {
            "inputs": {"input_ids": _tensor("int64", [rows, width]), **place, **adapters},
            "fixed": {"attention_mask": _tensor("int64", [rows, width], 1), **kept(0)},
            "bound": width,
        }
        for width in sorted({*(shapes.prompt_lengths or (shapes.prompt_tokens,))})
    }
    found["decode"] = {
        "inputs": {
            "input_ids": _tensor("int64", [rows, 1]),
            "attention_mask": _tensor("int64", [rows, room], 1),
            **kept(room),
            **adapters,
        },
        "fixed": place,
        "bound": room,
    }
    return found


def _passes(bundle: Bundle, shapes: Shapes) -> list[dict[str, Array]]:
    """Return inputs of each shape that is run: the timed one's, and the goldens'."""
    lengths = shapes.prompt_lengths or (shapes.prompt_tokens,)  # of several the first one is timed
    with open_session(bundle, threads=1, keep_graphs=False) as session:
        wanted = [example_inputs(session, None, Workload(lengths, 1, 1, shapes.batch_size))]
    wanted += [{key: np.asarray(a) for key, a in bundle.golden(name).inputs.items()} for name in bundle.adapter_names]
    return list({str([(key, a.shape) for key, a in sorted(each.items())]): each for each in wanted}.values())


def _tensor(dtype: str, shape: Sequence[int], fill: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [int(size) for size in shape], "fill": fill}


def signatures(bundle: Bundle, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Return the signatures of "plain", and of "slots" where there are adapters: see device_side/convert/request.py.

    Raises:
        ProfileError: if the bundle is of a kind that has no such form.
    """
    check_plain(bundle, decoder_spec(bundle.manifest))
    (record,) = bundle.manifest.graphs.values()
    adapters = {name: bundle.graph_tensors(name) for name in bundle.adapter_names} if record.slots else {}
    fed = {"plain": {}, **({"slots": _shapes_of(bundle, adapters)} if adapters else {})}
    return {form: _signatures(bundle, shapes, inputs) for form, inputs in fed.items()}
