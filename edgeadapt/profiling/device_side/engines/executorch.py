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
    """The .pte programs of a job: the base's, and one for each adapter, which stay open side by side.

    Options: data: the .ptd file with the base's weights, which all of them read
    """

    NAME = "executorch"
    OPTIONS = ("data",)

    def use(self, adapter: str | None) -> None:
        """Have an adapter's program run, or the base's."""
        self._choose(_form(adapter), {})

    def evict(self, adapter: str) -> None:
        """Close an adapter's program."""
        self._models.pop(_form(adapter), None)

    def _open(self, path: Path) -> Any:
        """Load a program and all of its methods."""
        _C._unsafe_reset_threadpool(self._threads)  # noqa: SLF001 - there is no other way to say how many
        program = Runtime.get().load_program(path, data_path=self._folder / self._job["options"]["data"])
        return program, {name: program.load_method(name) for name in sorted(program.method_names)}

    def _call(self, model: Any, _form: str, signature: str, inputs: dict[str, Array]) -> list[Array]:
        _, methods = model
        found = methods[signature].execute([_tensor(value) for value in inputs.values()])
        return [value.numpy() for value in found]


def _form(adapter: str | None) -> str:
    return "plain" if adapter is None else f"adapter.{adapter}"


def _tensor(value: Array) -> Any:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
