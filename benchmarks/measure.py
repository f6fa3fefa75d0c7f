"""What is measured of each side, one function per kind of figure. Nothing here knows an engine."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from agreement import agreement
from noise import Noise, between, snapshot
from preparation import texts_of
from side import Side, SideError
from workload import CHUNKS, NEW_TOKENS, PROMPT_TOKENS, Workload

from edgeadapt.profiling.device_side.system import memory_now

SWAP_PROMPT = 16
TOP1_FIRST = 64
FIRST_TOKENS = range(1000, 40000)
Failures = list[dict[str, str]]
Say = Callable[[str], None]


def attempt(side: Side, step: str, failures: Failures, call: Callable[[], Any]) -> Any:
    """What `call` returns, or None with a record of the failure."""
    try:
        return call()
    except (SideError, OSError, ValueError) as error:
        failures.append({"side": side.name, "step": step, "message": f"{error}"[:2000]})
        return None


_NUMBERS = count()


def fresh(ids: list[int]) -> list[int]:
    """The same text behind another first token, another one each time.

    An engine that keeps what it has read (OpenVINO's pipeline does) would else be timed for what it does not read.
    """
    return [FIRST_TOKENS[next(_NUMBERS) % len(FIRST_TOKENS)], *ids[1:]]


def memory_of(pid: int) -> dict[str, int | None]:
    """Resident, proportional and peak bytes of a process, and its anonymous ones (no file behind them)."""
    found = memory_now(Path("/proc") / str(pid))
    rollup = (Path("/proc") / str(pid) / "smaps_rollup").read_text()
    found["anonymous_bytes"] = sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if "Anonymous:" in line)
    return found


# --- start: load time and memory of a fresh process ------------------------------------------------------------------


def start(side: Side, workload: Workload, logs: Path) -> dict[str, Any]:
    """Start a process; its load times, and its memory after load, after use, and after use of another adapter.

    Afterwards it is there, and warm.
    """
    side.launch(logs)
    # The first answer of all: Python and the harness's own modules are up, the engine is not imported.
    loaded = side.load()
    memory = {"loaded": memory_of(side.pid())}
    first = side.ask(do="prefill", adapter=side.active, ids=workload.prompt, room=NEW_TOKENS + 4)
    # Twice: what a second prompt takes (a new cache while the old one is there) is not another adapter's.
    for _ in range(2):
        _decode(side, workload, 16)
        side.ask(do="prefill", adapter=side.active, ids=fresh(workload.prompt), room=NEW_TOKENS + 4)
    memory["used"] = memory_of(side.pid())
    for name in side.adapters if side.adapter and not side.promoted else ():
        if name != side.adapter:
            side.ask(do="prefill", adapter=name, ids=fresh(workload.prompt), room=NEW_TOKENS + 4)
            memory["used another adapter"] = memory_of(side.pid())
    return {**loaded, "first_call_s": first["seconds"], "memory": memory}


def several(sides: Sequence[Side], workload: Workload, logs: Path) -> int:
    """The proportional bytes of processes that hold the same model at the same time, all of them loaded and used."""
    try:
        for side in sides:
            side.launch(logs)
            side.load()
            side.ask(do="prefill", adapter=side.active, ids=workload.prompt, room=NEW_TOKENS + 4)
            _decode(side, workload, 16)
        return sum(memory_of(side.pid())["proportional_bytes"] or 0 for side in sides)
    finally:
        for side in sides:
            side.close()


def _decode(side: Side, workload: Workload, count: int) -> dict[str, Any]:
    if side.module.WHOLE:
        return side.ask(do="generate", adapter=side.active, ids=workload.prompt, count=count)
    return side.ask(do="decode", adapter=side.active, count=count)


# --- quality ---------------------------------------------------------------------------------------------------------


def quality(side: Side, workload: Workload, reference: Path, scratch: Path) -> dict[str, Any]:
    """KL and top-1 against torch and PEFT in float32, teacher-forced, and how far its greedy tokens are the same."""
    found: dict[str, Any] = {"mean_kl": None, "max_kl": None, "top1": None, "positions": 0}
    pairs = []
    for text in texts_of(side.adapter):
        wanted = np.load(reference / f"{side.adapter or ''}-{text}.npy")
        path = scratch / "logits.npy"
        ids = workload.held_out[text or None]
        if not side.ask(do="logits", adapter=side.active, ids=ids, path=str(path))["given"]:
            found.update(_top1_alone(side, workload, reference))
            break
        pairs.append((wanted, np.load(path)))
        path.unlink()
    if pairs:
        found.update(agreement(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])))
    expected = json.loads((reference / "greedy.json").read_text(encoding="utf-8"))[side.adapter or ""]
    first = side.ask(do="prefill", adapter=side.active, ids=workload.prompt, room=NEW_TOKENS + 4)
    tokens = _decode(side, workload, NEW_TOKENS - 2)["tokens"]
    tokens = (tokens if side.module.WHOLE else [first["token"], *tokens])[:NEW_TOKENS]
    same = (index for index, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
    return {**found, "greedy_same": next(same, len(expected)), "greedy_steps": len(expected)}


def _top1_alone(side: Side, workload: Workload, reference: Path) -> dict[str, Any]:
    """For an engine that gives no logits: its next token after each prefix of one text."""
    text = texts_of(side.adapter)[-1]
    ids = workload.held_out[text or None][: 2 * TOP1_FIRST]
    tokens = side.ask(do="top1", adapter=side.active, ids=ids, first=TOP1_FIRST + 1)["tokens"]
    wanted = np.load(reference / f"{side.adapter or ''}-{text}.npy")[TOP1_FIRST : len(ids)].argmax(-1)
    return {"top1": float((wanted == np.asarray(tokens)).mean()), "positions": len(tokens)}


# --- swaps -----------------------------------------------------------------------------------------------------------


def swaps(side: Side, workload: Workload, runs: int) -> dict[str, Any]:
    """Seconds from the call of a swap to ready and to the first token after a prompt of 16 tokens.

    From an adapter that was used before ("resident"), from its file ("from_disk"), and for comparison without a swap.
    """
    other = next((name for name in side.adapters if name != side.adapter), None)
    ids = workload.prompt[:SWAP_PROMPT]
    found: dict[str, list[Any]] = {}
    kinds = {
        "resident_ready_s": (other, True, False),
        "from_disk_ready_s": (other, False, False),
        "resident_first_token_s": (other, True, True),
        "from_disk_first_token_s": (other, False, True),
        "no_swap_first_token_s": (side.adapter, True, True),
    }
    for _ in range(runs + 1):
        for key, (before, resident, first_token) in kinds.items():
            answer = side.ask(
                do="swap", adapter=side.active, other=before, resident=resident, ids=fresh(ids), first_token=first_token
            )
            found.setdefault(key, []).append(answer["first_token_s" if first_token else "ready_s"])
    return {key: samples[1:] for key, samples in found.items()}  # the first of each warms up


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cell:
    """One side in the rounds: its samples by round; out of the game after its first failure."""

    side: Side
    samples: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failed: bool = False


def speed_rounds(
    cells: list[Cell], workload: Workload, *, first: int, rounds: int, deadline: float, failures: Failures, say: Say
) -> list[dict[str, Any]]:
    """Run rounds, numbered from `first`, until `rounds` quiet ones are done or the clock passes `deadline`.

    At least one is run whatever the clock (time.monotonic) says. A noisy round is kept and marked, and another one is
    run, up to twice as many. Returns each round's noise.
    """
    record: list[dict[str, Any]] = []
    quiet = 0
    while not record or (quiet < rounds and len(record) < 2 * rounds and time.monotonic() < deadline):
        number = first + len(record)
        taking_part = [cell for cell in cells if not cell.failed and (number - 1) % cell.side.module.EVERY == 0]
        noise = _round(_shuffled(taking_part, number), workload, number, failures)
        record.append({"round": number, "noisy": noise.noisy, **dataclasses.asdict(noise)})
        quiet += not noise.noisy
        say(
            f"round {number}: {noise.seconds:.0f} s, others used {noise.foreign_share:.1%}"
            + (" (noisy: to be repeated)" if noise.noisy else "")
        )
    return record


def _shuffled(cells: list[Cell], number: int) -> list[Cell]:
    """The cells in an order of the round's own, so that none is always asked after the same neighbour."""
    return random.Random(number).sample(cells, len(cells))  # noqa: S311 - a seed, not a secret


def _round(turn: list[Cell], workload: Workload, number: int, failures: Failures) -> Noise:
    pids = [cell.side.pid() for cell in turn]
    before, started = snapshot(pids), time.monotonic()
    for cell in turn:
        _sample(cell, number, failures, "prefill_512_s", _prefill(cell.side, workload.long_prompt, 1))
    for cell in turn:
        room = NEW_TOKENS + 2 * CHUNKS
        _sample(cell, number, failures, "prefill_128_s", _prefill(cell.side, workload.prompt, room))
    for chunk in range(CHUNKS):
        for cell in turn:
            if not cell.side.module.WHOLE:
                request = {"do": "decode", "adapter": cell.side.active, "count": NEW_TOKENS // CHUNKS}
                _sample(cell, number, failures, f"decode_{chunk}_s", request)
            elif chunk == 0:
                request = {
                    "do": "generate",
                    "adapter": cell.side.active,
                    "ids": fresh(workload.prompt),
                    "count": NEW_TOKENS,
                }
                _sample(cell, number, failures, "decode_s", request)
    for cell in turn:
        _join_chunks(cell.samples.get(number, {}))
    pids = [cell.side.pid() for cell in turn]
    return between(before, snapshot(pids), time.monotonic() - started)


def _join_chunks(samples: dict[str, Any]) -> None:
    chunks = [samples.pop(f"decode_{chunk}_s") for chunk in range(CHUNKS) if f"decode_{chunk}_s" in samples]
    if len(chunks) == CHUNKS:
        samples["decode_s"], samples["decode_chunks_s"] = sum(chunks), chunks


def _prefill(side: Side, ids: list[int], room: int) -> dict[str, Any]:
    return {"do": "prefill", "adapter": side.active, "ids": fresh(ids), "room": room}


def _sample(cell: Cell, number: int, failures: Failures, key: str, request: dict[str, Any]) -> None:
    if cell.failed:
        return
    answer = attempt(cell.side, f"{request['do']}, round {number}", failures, lambda: cell.side.ask(**request))
    if answer is None:
        cell.failed = True
        cell.samples.pop(number, None)
        return
    cell.samples.setdefault(number, {})[key] = answer["seconds"]


def prompt_lengths() -> dict[str, int]:
    """What the keys of a round's samples stand for, for the record."""
    return {"prompt_tokens": PROMPT_TOKENS, "long_prompt_tokens": 4 * PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
