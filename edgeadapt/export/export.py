"""The base as marked ONNX graphs: trace, lower the helper operators, fuse."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from types import ModuleType

import torch

from edgeadapt import registry
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import Graph
from edgeadapt.export.passes.drop_reshapes import drop_reshapes
from edgeadapt.export.passes.fuse import fuse
from edgeadapt.export.passes.gather_positions import gather_positions
from edgeadapt.export.passes.lower_helpers import lower_helpers, set_defaults
from edgeadapt.export.trace import markers, trace_to_onnx
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
    seconds: dict[str, float] = {}
    models = {}
    tracing = getattr(task, "tracing", contextlib.nullcontext)
    with torch.no_grad(), tracing(base):
        traces = task.traces(base)
        for role, trace in traces.items():
            start = time.perf_counter()
            with progress.stage(f"trace {role}"), markers(base.module, base.modules, tuple(replaced)):
                model = trace_to_onnx(trace)
            seconds[f"trace_{role}_s"] = time.perf_counter() - start
            start = time.perf_counter()
            with progress.stage(f"fuse {role}"):
                lower_helpers(model)
                model = fuse(model)
                drop_reshapes(model)
                gather_positions(model)
                set_defaults(model)
            seconds[f"fuse_{role}_s"] = time.perf_counter() - start
            models[role] = model
    return Graph(models=models, task=base.task, generation=task.generation(base), seconds=seconds)
