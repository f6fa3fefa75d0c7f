"""One torch module traced to one marked ONNX model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch.nn.utils import parametrize

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN, PARAMETER_SITE

OPSET = 21


@dataclass(frozen=True)
class Trace:
    """What `torch.onnx.export` needs to know of one graph.

    module: called with the inputs as positional arguments, returns a flat tuple of tensors
    inputs: example tensor per input name, in the order of the arguments
    axes: the name of every axis that may vary, per input
    outputs: names, in the order of the returned tuple
    output_axes: names of varying axes where they cannot be derived from the inputs
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    output_axes: Mapping[str, Mapping[int, str]]


class _ParameterMarker(torch.nn.Module):
    def __init__(self, parameter: str) -> None:
        super().__init__()
        self.parameter = parameter

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if not torch.onnx.is_in_onnx_export() and not torch.compiler.is_exporting():
            return value
        return torch.onnx.ops.symbolic(
            f"{MARKER_DOMAIN}::{PARAMETER_SITE}",
            (value,),
            {"parameter": self.parameter},
            dtype=value.dtype,
            shape=value.shape,
        )


def _site_hook(path: str, kind: str) -> Any:
    def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            raise ExportError(
                f"module {path} does not return one tensor, so no adapter can be attached to it",
                hint="this architecture is not supported yet",
            )
        # A norm's input is left alone: a second reader of it would stop the residual-and-norm fusion.
        x = args[0] if args and kind not in ("norm", "other") else output
        return torch.onnx.ops.symbolic(
            f"{MARKER_DOMAIN}::{ADAPTER_SITE}", (x, output), {"site": path}, dtype=output.dtype, shape=output.shape
        )

    return hook


@contextlib.contextmanager
def markers(module: torch.nn.Module, sites: Mapping[str, TargetModule], replaced: Iterable[str]) -> Iterator[None]:
    """Put a marker behind every module in `sites` and on every parameter in `replaced`, for the time of a trace."""
    handles = []
    parametrized: list[tuple[torch.nn.Module, str]] = []
    try:
        for path, target in sites.items():
            handles.append(module.get_submodule(path).register_forward_hook(_site_hook(path, target.type)))
        for name in replaced:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            parametrize.register_parametrization(owner, leaf, _ParameterMarker(name), unsafe=True)
            parametrized.append((owner, leaf))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, leaf in parametrized:
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)


def trace_to_onnx(trace: Trace) -> ir.Model:
    """Return the ONNX model of `trace`, unoptimized, initializers under their torch names.

    Raises:
        ExportError: if torch cannot trace the module, or fixes an axis that must vary.
    """
    # AUTO lets torch fix an axis that the model cannot vary (an image's height); the check below tells which ones.
    shapes = tuple(dict.fromkeys(trace.axes.get(name, {}), torch.export.Dim.AUTO) or None for name in trace.inputs)
    args = tuple(trace.inputs.values())
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet():
            warnings.simplefilter("ignore")
            exported = torch.export.export(trace.module, args, dynamic_shapes=(shapes,), strict=False)
            program = torch.onnx.export(
                exported,
                args,
                input_names=list(trace.inputs),
                output_names=list(trace.outputs),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
            )
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch could not trace {type(trace.module).__name__}: {type(error).__name__}: {_first_line(error)}",
            hint="run with the environment variable TORCH_LOGS=export for details; this architecture may need support",
        ) from error
    assert program is not None
    model = program.model
    _name_axes(model, trace)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging advice, and the stack of an error that is raised as well."""
    levels = {"torch.onnx": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""


def _name_axes(model: ir.Model, trace: Trace) -> None:
    """Give varying axes their field names ("batch"), and refuse a model in which a required one got fixed."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        axes = trace.axes.get(value.name or "", {})
        dims = [_dim(dim) for dim in value.shape or ()]
        for axis, name in axes.items():
            if isinstance(dims[axis], str):
                names.setdefault(str(dims[axis]), name)
                dims[axis] = name
            elif any(word in name for word in ("batch", "sequence", "past", "total")):
                raise ExportError(
                    f"torch fixed axis {axis} ({name}) of input {value.name} at {dims[axis]}",
                    hint="the model's code depends on this size; this architecture needs support",
                )
        value.shape = ir.Shape(dims)
    for value in model.graph.outputs:
        axes = trace.output_axes.get(value.name or "", {})
        dims = [_dim(dim) for dim in value.shape or ()]
        named = [
            dim if isinstance(dim, int) else names.get(dim, f"{value.name}_{axis}") for axis, dim in enumerate(dims)
        ]
        value.shape = ir.Shape([axes.get(axis, dim) for axis, dim in enumerate(named)])


def _dim(dim: object) -> int | str:
    """Return a size, or the name of a size that varies; torch writes sizes that it fixed as names like "32"."""
    text = str(dim)
    return int(text) if text.isdigit() else text
