"""A measured child: an onnxruntime-genai model folder. Speaks the protocol of child.py.

Runs in onnxruntime-genai's own environment. The base is the graph that its builder wrote; the adapter runs on the
slots graph of genai_slots.py, in a second model in this process.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from agreement import agreement
from child import resident_bytes, serve

STATE: dict[Any, Any] = {}


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


def prefill(active: bool, prompt: list[int], room: int) -> dict[str, Any]:
    """Read `prompt` into a new generator with `room` more places; the adapter is active if `active`."""
    generator = _generator(active, len(prompt) + room)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()  # only picks the token: append_tokens has the logits
    seconds = time.perf_counter() - started
    STATE[active] = generator
    return {"prefill_s": seconds, "use_s": None, "token": int(generator.get_next_tokens()[0])}


def decode(active: bool, steps: int) -> dict[str, Any]:
    """Go on where the last request with the same `active` stopped: one step untimed, then `steps` timed, greedy."""
    generator = STATE[active]
    before = len(generator.get_sequence(0))
    generator.generate_next_token()
    started = time.perf_counter()
    for _ in range(steps):
        generator.generate_next_token()
    seconds = time.perf_counter() - started
    tokens = [int(token) for token in generator.get_sequence(0)[before:]]
    if len(tokens) != steps + 1:
        raise RuntimeError(f"{len(tokens)} tokens instead of {steps + 1}")
    return {"decode_s": seconds, "tokens": tokens}


def quality(active: bool, prompt: list[int], reference: str) -> dict[str, Any]:
    """Compare the logits at every position of `prompt` with the reference file's."""
    generator = _generator(active, len(prompt) + 1)
    generator.append_tokens(prompt)
    return agreement(np.load(reference), np.asarray(generator.get_output("logits"))[0])


def _generator(active: bool, max_length: int) -> Any:
    model = STATE["slots" if active else "plain"]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length, do_sample=False)
    generator = og.Generator(model, parameters)
    if active:
        generator.set_active_adapter(STATE["adapters"], STATE["adapter"])
    return generator


def _model(folder: Path, threads: int) -> Any:
    config = og.Config(str(folder))
    # The end token is moved to one that greedy decoding never gives, so that every run has the same length.
    options = {"decoder": {"session_options": {"intra_op_num_threads": threads}}, "eos_token_id": 49151}
    config.overlay(json.dumps({"model": options}))
    return og.Model(config)


if __name__ == "__main__":
    serve({"load": load, "prefill": prefill, "decode": decode, "quality": quality})
