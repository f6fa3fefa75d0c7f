"""The base as marked ONNX graphs: trace, lower the helper operators, fuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from types import ModuleType

import onnx_ir as ir
import torch

from edgeadapt import registry
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import Graph
from edgeadapt.export.passes.drop_reshapes import drop_reshapes
from edgeadapt.export.passes.fuse import fuse
from edgeadapt.export.passes.gather_positions import gather_positions
from edgeadapt.export.passes.lower_helpers import lower_helpers, set_defaults
from edgeadapt.export.passes.rotary_rows import rotary_rows
from edgeadapt.export.repeats import find_repeat, shorten, shortened
from edgeadapt.export.stamp import stamp
from edgeadapt.export.trace import Trace, markers, trace_to_onnx
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.progress import SILENT, Progress

TASKS = "edgeadapt.export.tasks"


def task_of(base: BaseModel) -> ModuleType:
    """Return the file in `export/tasks` that exports `base`."""
    modules = sorted((registry.load(TASKS, name, ExportError) for name in registry.names(TASKS)), key=lambda m: m.ORDER)
    for module in modules:
        if module.claims(base):
            return module
    raise ExportError(
        f"no task exports {base.name!r} ({base.model_type}, task {base.task!r})",
        hint="pass --task, or use edgeadapt.base_from_module for a plain torch module",
    )


def export_graph(base: BaseModel, *, replaced: Iterable[str] = (), progress: Progress = SILENT) -> Graph:
    """Return `base` as ONNX models with a marker at every module that an adapter may change.

    Args:
        base: the model; its torch module is left as it was.
        replaced: parameters ("classifier.weight") that adapters replace whole.
        progress: told of each stage.

    Raises:
        ExportError: if no task claims the base, or torch cannot trace it.
    """
    task = task_of(base)
    names = tuple(replaced)
    models = {}
    tracing = getattr(task, "tracing", contextlib.nullcontext)
    with torch.no_grad(), tracing(base):
        for role, trace in task.traces(base).items():
            with progress.stage(f"trace {role}"), markers(base.module, base.modules, names):
                models[role] = _model(base.module, trace, names)
    return Graph(models=models, task=base.task, generation=task.generation(base))


def _model(module: torch.nn.Module, trace: Trace, replaced: Sequence[str]) -> ir.Model:
    """Return the fused model of one trace; of equal layers only the first few are traced."""
    repeat = find_repeat(module, trace)
    if repeat is not None and not any(name.startswith(f"{repeat.path}.") for name in replaced):
        with shortened(module, repeat) as stand_ins:
            model = _fused(trace_to_onnx(shorten(trace)))
        if stamp(model, repeat, trace, module, stand_ins):
            return model
    return _fused(trace_to_onnx(trace))


def _fused(model: ir.Model) -> ir.Model:
    lower_helpers(model)
    model = fuse(model)
    drop_reshapes(model)
    gather_positions(model)
    rotary_rows(model)
    set_defaults(model)
    return model
