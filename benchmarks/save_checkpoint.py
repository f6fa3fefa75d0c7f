"""Save a base as a float32 Hugging Face folder, for a peer's builder: python save_checkpoint.py BASE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeadapt.merging.load import load_base_model


def main() -> None:
    """Write the model and the files that travel with it (the tokenizer as edgeadapt repairs it)."""
    source, folder = sys.argv[1], Path(sys.argv[2])
    base = load_base_model(source, task="text-generation")
    base.module.config.architectures = [type(base.module).__name__]
    base.module.save_pretrained(folder)
    for name, content in base.assets.items():
        if name != "config.json":
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
