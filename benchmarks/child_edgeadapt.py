"""A measured child: an edgeadapt bundle. Speaks the protocol of child.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from agreement import agreement
from child import resident_bytes, serve

STATE: dict[Any, Any] = {}


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


def prefill(active: bool, prompt: list[int], room: int) -> dict[str, Any]:
    """Read `prompt` into a new cache with `room` more places; the adapter is active if `active`."""
    session = STATE["session"]
    started = time.perf_counter()
    session.use(STATE["adapter"] if active else None)
    use_s = time.perf_counter() - started
    cache = session.new_cache(1, len(prompt) + room)
    started = time.perf_counter()
    logits = session.step(np.asarray([prompt], dtype=np.int64), cache, logits="last")
    token = int(logits[0, -1].argmax())
    seconds = time.perf_counter() - started
    STATE[active] = (cache, token)
    return {"prefill_s": seconds, "use_s": use_s, "token": token}


def decode(active: bool, steps: int) -> dict[str, Any]:
    """Go on where the last request with the same `active` stopped: one step untimed, then `steps` timed, greedy."""
    session, (cache, token) = STATE["session"], STATE[active]
    session.use(STATE["adapter"] if active else None)
    tokens = [_next(session, cache, token)]
    started = time.perf_counter()
    for _ in range(steps):
        tokens.append(_next(session, cache, tokens[-1]))
    seconds = time.perf_counter() - started
    STATE[active] = (cache, tokens[-1])
    return {"decode_s": seconds, "tokens": tokens}


def quality(active: bool, prompt: list[int], reference: str) -> dict[str, Any]:
    """Compare the logits at every position of `prompt` with the reference file's."""
    session = STATE["session"]
    session.use(STATE["adapter"] if active else None)
    cache = session.new_cache(1, len(prompt))
    logits = session.step(np.asarray([prompt], dtype=np.int64), cache, logits="all")
    return agreement(np.load(reference), logits[0])


def _next(session: Any, cache: Any, token: int) -> int:
    return int(session.step(np.asarray([[token]], dtype=np.int64), cache, logits="last")[0, -1].argmax())


if __name__ == "__main__":
    serve({"load": load, "prefill": prefill, "decode": decode, "quality": quality})
