"""What torch and PEFT give in float32: python reference.py CHECKPOINT ADAPTERS_JSON FOLDER THREADS.

FOLDER/workload.json holds a prompt and texts in token ids. For each adapter (and "" for the base) FOLDER gets
ADAPTER-TEXT.npy, float32[positions, vocab], for prose ("") and the adapter's own text, and in greedy.json its 128
greedy tokens after the prompt. Runs in edgeadapt's environment, with the engine that measures PEFT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from child import load_engine
from preparation import texts_of
from workload import NEW_TOKENS


def main() -> None:
    """Write the files."""
    checkpoint, folder, threads = Path(sys.argv[1]), Path(sys.argv[3]), int(sys.argv[4])
    adapters: dict[str, str] = json.loads(sys.argv[2])
    workload = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    module = load_engine(Path(__file__).parent / "engines" / "peft.py")
    (folder / "checkpoint").symlink_to(checkpoint.resolve())
    greedy = {}
    for name in (None, *adapters):
        engine = module.Engine("fp32", folder, threads, {} if name is None else {name: adapters[name]})
        greedy[name or ""] = [engine.prefill(workload["prompt"], NEW_TOKENS), *engine.decode(NEW_TOKENS - 1)]
        for text in texts_of(name):
            np.save(folder / f"{name or ''}-{text}.npy", engine.logits(workload["texts"][text]))
    (folder / "greedy.json").write_text(json.dumps(greedy), encoding="utf-8")


if __name__ == "__main__":
    main()
