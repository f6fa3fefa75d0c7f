"""A measured child: an onnxruntime-genai model folder. Speaks the protocol of child.py.

Runs in onnxruntime-genai's own environment. The base is the graph that its builder wrote; the adapter runs on the
slots graph of genai_slots.py, in a second model in this process.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
from child import resident_bytes, serve

STATE: dict[str, Any] = {"active": False}


def load(path: str, threads: int, adapter: str | None) -> dict[str, Any]:
    """Open FOLDER/plain, and FOLDER/slots with its one adapter file if `adapter` is given."""
    from importlib.metadata import version

    started = time.perf_counter()
    STATE["plain"] = _model(Path(path) / "plain", threads)
    seconds, resident = time.perf_counter() - started, resident_bytes()
    if adapter is not None:
        STATE["slots"] = _model(Path(path) / "slots", threads)
        STATE["adapters"] = og.Adapters(STATE["slots"])
        STATE["adapters"].load(str(Path(path) / "slots" / f"{adapter}.onnx_adapter"), adapter)
        STATE["adapter"] = adapter
    return {"load_s": seconds, "resident_bytes": resident, "onnxruntime-genai": version("onnxruntime-genai")}


def use(active: bool) -> dict[str, Any]:
    """Make the adapter active, or none; genai needs a new generator for it, which `run` makes anyway."""
    if active and "slots" not in STATE:
        raise RuntimeError("no slots model was loaded")
    STATE["active"] = active
    return {"use_s": None}


def run(prompt: list[int], steps: int) -> dict[str, Any]:
    """Prefill `prompt`, then decode greedily `steps` tokens after the first."""
    model = STATE["slots" if STATE["active"] else "plain"]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + steps + 1, do_sample=False)
    generator = og.Generator(model, parameters)
    if STATE["active"]:
        generator.set_active_adapter(STATE["adapters"], STATE["adapter"])
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    prefill = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        generator.generate_next_token()
    seconds = time.perf_counter() - started
    tokens = [int(t) for t in generator.get_sequence(0)[len(prompt) :]]
    if len(tokens) != steps + 1:
        raise RuntimeError(f"{len(tokens)} tokens instead of {steps + 1}")
    return {"prefill_s": prefill, "decode_s": seconds, "tokens": tokens}


def _model(folder: Path, threads: int) -> Any:
    config = og.Config(str(folder))
    # The end token is moved to one that greedy decoding never gives, so that every run has the same length.
    options = {"decoder": {"session_options": {"intra_op_num_threads": threads}}, "eos_token_id": 49151}
    config.overlay(json.dumps({"model": options}))
    return og.Model(config)


if __name__ == "__main__":
    serve({"load": load, "use": use, "run": run})
