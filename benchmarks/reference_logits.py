"""Save what torch and peft give in float32: python reference_logits.py BASE ADAPTER_FOLDER IDS.json OUT_FOLDER.

IDS.json holds a list of token ids; OUT_FOLDER gets base.npy and adapter.npy, float32[positions, vocab].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from edgeadapt.merging.load import load_base_model


@torch.no_grad()
def main() -> None:
    """Write both files."""
    source, adapter, ids_file, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    ids = torch.tensor([json.loads(ids_file.read_text(encoding="utf-8"))])
    base = load_base_model(source, task="text-generation")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "base.npy", base.module(input_ids=ids).logits[0].numpy())
    adapted = PeftModel.from_pretrained(base.module, adapter).eval()  # unmerged
    np.save(folder / "adapter.npy", adapted(input_ids=ids).logits[0].numpy())


if __name__ == "__main__":
    main()
