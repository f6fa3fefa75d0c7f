"""ExecuTorch with XNNPACK, through its Python interface, which needs torch."""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from executorch.extension.pybindings import _C
from executorch.runtime import Runtime

from ._fixed import FixedShapes

Array = Any


def version() -> str:
    """Return ExecuTorch's version."""
    return version_of("executorch")


class Engine(FixedShapes):
    """The .pte programs of a job."""

    NAME = "executorch"

    def _open(self, path: Path) -> Any:
        """Load a program and all of its methods."""
        _C._unsafe_reset_threadpool(self._threads)  # noqa: SLF001 - there is no other way to say how many
        program = Runtime.get().load_program(path)
        return program, {name: program.load_method(name) for name in sorted(program.method_names)}

    def _call(self, model: Any, _form: str, signature: str, inputs: dict[str, Array]) -> list[Array]:
        _, methods = model
        found = methods[signature].execute([_tensor(value) for value in inputs.values()])
        return [value.numpy() for value in found]

    def _resident_array(self, array: Array) -> Array:
        return torch.tensor(array)


def _tensor(value: Array) -> Any:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
