"""Models that answer in one pass: encoders, classifiers, vision, CLIP. optimum tells their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import ExportError
from edgeadapt.export.trace import Trace
from edgeadapt.merging.base_model import BaseModel

ORDER = 9


def claims(base: BaseModel) -> bool:
    """Return whether this file exports `base`: any transformers model that no other task claims."""
    return base.config is not None and base.task != "module"


def generation(_base: BaseModel) -> DecoderSpec | None:
    """Return None: nothing is generated."""
    return None


def traces(base: BaseModel) -> dict[str, Trace]:
    """Return the trace of role "model".

    Raises:
        ExportError: if optimum does not know the architecture or the task.
    """
    example, axes = inputs(base)
    wrapper = _Single(base.module, tuple(example))
    names = wrapper.output_names(example)
    return {"model": Trace(wrapper, example, axes, names, {})}


class _Single(torch.nn.Module):
    """Calls a transformers model with keyword inputs and returns its tensor outputs by field order."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def output_names(self, example: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        with torch.no_grad():
            result = self.module(**example)
        return tuple(name for name, value in result.items() if isinstance(value, torch.Tensor))

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(**dict(zip(self.names, args, strict=True)))
        return tuple(value for value in result.values() if isinstance(value, torch.Tensor))


def inputs(base: BaseModel) -> tuple[dict[str, torch.Tensor], dict[str, Mapping[int, str]]]:
    """Return example inputs by name and the names of their varying axes, as optimum has them for the architecture.

    A model of windows (Swin) is traced at its pictures' size: padding to whole windows, worked out for any size, takes
    torch's exporter many minutes.

    Raises:
        ExportError: if optimum does not know the architecture or the task.
    """
    # Importing the package registers its architectures.
    import optimum.exporters.onnx.model_configs  # noqa: F401
    from optimum.exporters.tasks import TasksManager

    try:
        constructor = TasksManager.get_exporter_config_constructor(
            exporter="onnx", model=base.module, task=base.task, library_name="transformers"
        )
        config: Any = constructor(base.config)
    except (KeyError, ValueError) as error:
        raise ExportError(
            f"no export is known for a {base.model_type} model with task {base.task}: {error}",
            hint="choose another --task, or pass the torch module through edgeadapt.base_from_module",
        ) from error
    sizes = {"batch_size": 2, "sequence_length": 7}
    image = getattr(getattr(base.config, "vision_config", base.config), "image_size", None)
    if isinstance(image, int):
        sizes |= {"height": image, "width": image}
    dummies = config.generate_dummy_inputs(framework="pt", **sizes)
    example = {name: dummies[name] for name in config.inputs if name in dummies}
    fixed = ("height", "width") if isinstance(getattr(base.config, "window_size", None), int) else ()
    return example, {
        name: {axis: said for axis, said in config.inputs[name].items() if said not in fixed} for name in example
    }
