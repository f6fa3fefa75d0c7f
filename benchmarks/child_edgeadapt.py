"""A measured child: an edgeadapt bundle. Speaks the protocol of child.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from child import resident_bytes, serve

STATE: dict[str, Any] = {}


def load(path: str, threads: int, adapter: str | None) -> dict[str, Any]:
    """Open the bundle; `adapter` is the adapter's name in it."""
    from importlib.metadata import version

    import edgeadapt

    started = time.perf_counter()
    STATE["session"] = edgeadapt.open_session(Path(path), threads=threads)
    STATE["session"].prepare()  # graphs are opened when first needed; peers open theirs at load
    seconds = time.perf_counter() - started
    STATE["adapter"] = adapter
    return {"load_s": seconds, "resident_bytes": resident_bytes(), "onnxruntime": version("onnxruntime")}


def use(active: bool) -> dict[str, Any]:
    """Make the adapter active, or none."""
    started = time.perf_counter()
    STATE["session"].use(STATE["adapter"] if active else None)
    return {"use_s": time.perf_counter() - started}


def run(prompt: list[int], steps: int) -> dict[str, Any]:
    """Prefill `prompt`, then decode greedily `steps` tokens after the first."""
    session = STATE["session"]
    cache = session.new_cache(1, len(prompt) + steps + 1)
    started = time.perf_counter()
    logits = session.step(np.asarray([prompt], dtype=np.int64), cache, logits="last")
    tokens = [int(logits[0, -1].argmax())]
    prefill = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        logits = session.step(np.asarray([[tokens[-1]]], dtype=np.int64), cache, logits="last")
        tokens.append(int(logits[0, -1].argmax()))
    return {"prefill_s": prefill, "decode_s": time.perf_counter() - started, "tokens": tokens}


if __name__ == "__main__":
    serve({"load": load, "use": use, "run": run})
