"""Virtual tokens in peft: loaded, proven to be the saved ones, and run so that only the user's tokens are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import MergeError

CACHES = ("PREFIX_TUNING", "CARTRIDGE")
"""Types that fill the cache; the others put embeddings before those of the text."""


def load_virtual_tokens(module: nn.Module, config: Any, adapter: Adapter, name: str) -> Any:
    """Return a PeftModel on `module` with the adapter's virtual tokens under `name`.

    Its forward gives the logits of the user's tokens alone, and runs the adapter's own task if it has several.

    Raises:
        MergeError: if peft did not take in what was saved.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config.inference_mode = True
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = "RANDOM"  # what was saved comes in its place; others read files that a config names
    model: Any = get_peft_model(module, config, adapter_name=name)
    tensors = {key: torch.from_numpy(np.array(ref.read())) for key, ref in adapter.tensors.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    _prove_loaded(model.prompt_encoder[name], tensors, adapter)
    _show_user_tokens(model, config, adapter.task_id)
    return model


def _prove_loaded(encoder: Any, tensors: dict[str, torch.Tensor], adapter: Adapter) -> None:
    held = {key: encoder.embedding.weight if key == "prompt_embeddings" else getattr(encoder, key) for key in tensors}
    wrong = sorted(key for key, value in tensors.items() if not torch.equal(held[key].detach(), value))
    if wrong:
        raise MergeError(
            f"peft's copy of adapter {adapter.name!r} is not the saved one: {', '.join(wrong)} has other values",
            hint="save the adapter again with peft's save_pretrained",
        )


def _show_user_tokens(model: Any, config: Any, task_id: int | None) -> None:
    tokens = 0 if str(config.peft_type.value) in CACHES else config.num_virtual_tokens

    def give_task(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        return args, {**kwargs, "task_ids": torch.tensor([task_id] * rows)}

    def drop_virtual(_model: nn.Module, _args: Any, output: Any) -> Any:
        output["logits"] = output["logits"][:, tokens:]
        return output

    if task_id is not None:
        model.register_forward_pre_hook(give_task, with_kwargs=True)
    if tokens:
        model.register_forward_hook(drop_virtual)
