"""Outputs that are computed when asked for: alone or as rows of a batch, the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.modules import target_modules
from edgeadapt.merging.originals import LazyOutputs


def _case(length: int, rows: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.arange(length * rows).reshape(rows, length) * 7 % 32
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_texts_of_one_length_are_run_together() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    base = BaseModel(model, "tiny", None, "text-generation", "llama", target_modules(model))
    cases = [*(_case(4) for _ in range(5)), _case(3), _case(3, rows=2), _case(3), _case(3)]
    runs: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _module, _args, arguments: runs.append(tuple(arguments["input_ids"].shape)), with_kwargs=True
    )
    lazy = LazyOutputs(base, lambda: model, cases)

    together = list(lazy)

    assert runs == [(4, 4), (1, 4), (1, 3), (2, 3), (2, 3)]
    assert len(together) == len(lazy) == 9
    for index, outputs in enumerate(together):
        np.testing.assert_allclose(outputs["logits"], lazy[index]["logits"], rtol=1e-5, atol=1e-6)


def test_what_may_be_no_batch_is_run_alone() -> None:
    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(0)

    module = Sums()
    base = BaseModel(module, "sums", None, "module", "module", {})
    cases = [{"x": torch.ones(1, 4)}, {"x": 2 * torch.ones(1, 4)}]
    lazy = LazyOutputs(base, lambda: module, cases)
    assert [outputs["output"].tolist() for outputs in lazy] == [[1.0] * 4, [2.0] * 4]
