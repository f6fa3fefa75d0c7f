"""A plain torch module: the user gave example inputs and which axes vary."""

from __future__ import annotations

import torch

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.export.trace import Trace
from edgeadapt.merging.base_model import BaseModel

ORDER = 1


def claims(base: BaseModel) -> bool:
    """Return whether `base` is a plain torch module."""
    return base.task == "module"


def generation(_base: BaseModel) -> DecoderSpec | None:
    """Return None: nothing is generated."""
    return None


def traces(base: BaseModel) -> dict[str, Trace]:
    """Return the trace of role "model"."""
    wrapper = _Module(base.module, tuple(base.example_inputs))
    return {"model": Trace(wrapper, dict(base.example_inputs), dict(base.dynamic_axes), base.output_names, {})}


class _Module(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(**dict(zip(self.names, args, strict=True)))
        return result if isinstance(result, tuple) else (result,)
