"""PEFT in torch, float32: where adapters come from, and the reference that quality is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABEL = "PEFT (torch, float32)"
PACKAGES = (
    ("torch==2.13.0",),
    ("torch==2.13.0", "transformers==4.57.6", "peft==0.21.2", "safetensors"),
)
MODULES = ("numpy", "torch", "transformers", "peft")
VERSIONS = ("torch", "transformers", "peft")
SWITCHES_AT_ONCE = True
WHOLE = False
EVERY = 3  # takes part in every third round: slow
CONFIGURATIONS: dict[str, dict[str, Any]] = {"fp32": {}}


def prepare(configuration: str, base: str, checkpoint: str, adapters: dict[str, str], folder: str) -> None:
    """The float32 checkpoint and the adapters are used as they are."""
    del configuration, base, adapters
    Path(folder, "checkpoint").unlink(missing_ok=True)
    Path(folder, "checkpoint").symlink_to(Path(checkpoint).resolve())


def files(folder: Path, adapter: str) -> dict[str, list[Path]]:
    """The base's file; the adapter is PEFT's own file."""
    del adapter
    return {"base": list((folder / "checkpoint").glob("*.safetensors")), "adapter": []}


class Engine:
    """A causal language model, wrapped by PEFT if there are adapters."""

    def __init__(self, configuration: str, folder: Path, threads: int, adapters: dict[str, str]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        del configuration
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._paths = torch, adapters
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
        self._peft: Any = None
        self._cache: Any = None
        self._token = 0
        if adapters:
            self.use(next(iter(adapters)))

    def use(self, adapter: str | None) -> None:
        """Make an adapter active, loading it if it is not loaded."""
        from peft import PeftModel

        if adapter is None:
            if self._peft is not None:
                self._peft.base_model.disable_adapter_layers()
            return
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._model, self._paths[adapter], adapter_name=adapter).eval()
        elif adapter not in self._peft.peft_config:
            self._peft.load_adapter(self._paths[adapter], adapter_name=adapter)
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(adapter)

    def forget(self, adapter: str) -> None:
        """Delete an adapter's tensors."""
        if self._peft is not None and adapter in self._peft.peft_config:
            self._peft.delete_adapter(adapter)

    def prefill(self, ids: list[int], room: int) -> int:
        """Read a prompt into a new cache; the first token."""
        del room
        self._cache = None
        return self._next(ids)

    def decode(self, count: int) -> list[int]:
        """`count` more tokens."""
        return [self._next([self._token]) for _ in range(count)]

    def logits(self, ids: list[int]) -> Any:
        """Logits at every position."""
        return (self._peft or self._model)(input_ids=self._torch.tensor([ids])).logits[0].numpy()

    def _next(self, ids: list[int]) -> int:
        model, tensor = self._peft or self._model, self._torch.tensor([ids])
        out = model(input_ids=tensor, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._token = out.past_key_values, int(out.logits[0, -1].argmax())
        return self._token
