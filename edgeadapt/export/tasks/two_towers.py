"""Models of pictures and texts as two graphs (CLIP, SigLIP): an app embeds its texts once, and pictures as they come.

One manifest, one base and one set of adapters: an adapter may act in either graph or in both. Each graph gives its
tower's features at length 1, as the whole model does.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.export.tasks.single_pass import inputs
from edgeadapt.export.trace import Trace
from edgeadapt.merging.base_model import BaseModel

ORDER = 5
TYPES = ("clip", "siglip")


def claims(base: BaseModel) -> bool:
    """Return whether `base` is a model of two towers whose features are wanted."""
    towers = all(hasattr(base.module, name) for name in ("get_image_features", "get_text_features"))
    return base.task == "feature-extraction" and base.model_type in TYPES and towers


def generation(_base: BaseModel) -> DecoderSpec | None:
    """Return None: nothing is generated."""
    return None


def traces(base: BaseModel) -> dict[str, Trace]:
    """Return the traces of roles "image" and "text".

    Raises:
        ExportError: if optimum does not know the architecture.
    """
    example, axes = inputs(base)
    found = {}
    for role in ("image", "text"):
        names = tuple(name for name in example if (name == "pixel_values") == (role == "image"))
        found[role] = Trace(
            _Tower(base.module, role, names),
            {name: example[name] for name in names},
            {name: axes[name] for name in names},
            (f"{role}_embeds",),
            {},
        )
    return found


class _Tower(torch.nn.Module):
    """Calls one tower with keyword inputs and returns its features at length 1."""

    def __init__(self, module: torch.nn.Module, role: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module: Any = module
        self.role = role
        self.names = names

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tower = self.module.get_image_features if self.role == "image" else self.module.get_text_features
        features = tower(**dict(zip(self.names, args, strict=True)))
        return (features / features.norm(p=2, dim=-1, keepdim=True),)
