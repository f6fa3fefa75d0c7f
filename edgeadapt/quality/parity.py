"""The unquantized graph against torch: every adapter and none, in every way a session can be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import ExportError
from edgeadapt.quality.compare import compare, output_mask

Array = NDArray[Any]
Case = Mapping[str, Array]
Run = Callable[[], Mapping[str, Array]]
References = Mapping[str | None, Sequence[Mapping[str, Array]]]

CHUNKS = (3, 5)
"""Chunk sizes that do not divide usual lengths, so that the last chunk is a short one."""


def measure_parity(
    session: Any, cases: Sequence[Case], references: References, *, tolerance: float = 1e-4
) -> dict[str, Any]:
    """Return the largest relative error of every adapter (None: the base) in every mode, JSON-able.

    A decoder runs whole sequences ("prefill"), chunks ("chunks of 3") and single tokens ("token by token"); a
    sequence-to-sequence model whole and token by token; other models are just run. Cases with several rows count under
    "..., batch". How a graph is run has nothing to do with an adapter's values, so all modes are for the base, for the
    first adapter, and for the first one with virtual tokens; the others are run whole, and once in chunks. At the end
    adapters are swapped back: the same adapter must give the same bits.

    Args:
        session: a `runtime.session.Session` over the unquantized graph.
        cases: inputs by name.
        references: the original's outputs for each case, by adapter name; None for the base.
        tolerance: the largest allowed error, relative to the largest value of an output. 1e-4 is what float32 sums in
            another order give on deep models, with a margin.

    Raises:
        ExportError: naming output, adapter, mode and error, if one is larger, or if a swap is not exact.
    """
    if not cases or not references:
        raise ExportError("there is nothing to compare with", hint="give at least one case and the base's references")
    worst: dict[tuple[str | None, str], float] = {}
    first: dict[str | None, Mapping[str, Array]] = {}
    in_all_modes: dict[bool, str] = {}  # with virtual tokens or without -> the first such adapter
    for adapter, expected in references.items():
        session.use(adapter)
        if adapter is not None:
            in_all_modes.setdefault(bool(getattr(session, "prefix_tokens", 0)), adapter)
        for case, reference in zip(cases, expected, strict=True):
            modes = list(_modes(session, case))
            for mode, run in modes if adapter in (None, *in_all_modes.values()) else _few(modes, case):
                outputs = run()
                first.setdefault(adapter, outputs)  # of the first case, run as it is
                output, error = compare(reference, outputs, output_mask(case)).worst
                if not error <= tolerance:
                    raise ExportError(
                        f"output {output!r} of {_say(adapter)} differs from torch by {error:.2g} of its largest value "
                        f"in mode {mode!r} (allowed: {tolerance:g})",
                        hint="this is a wrong export, not rounding; please report the model's class and this message",
                    )
                worst[adapter, mode] = max(worst.get((adapter, mode), 0.0), error)
    _check_swaps(session, cases[0], first)
    session.use(None)
    return {
        "tolerance": tolerance,
        "cases": len(cases),
        "max_relative_error": max(worst.values()),
        "swaps_are_exact": True,
        "rows": [
            {"adapter": adapter, "mode": mode, "max_relative_error": error} for (adapter, mode), error in worst.items()
        ],
    }


def _modes(session: Any, case: Case) -> Iterator[tuple[str, Run]]:
    """Yield (name, a run of the case) for every way to run it."""
    several = ", batch" if len(next(iter(case.values()))) > 1 else ""
    if getattr(session, "spec", None) is None:
        yield f"run{several}", partial(session.run, case)
    elif "decoder_input_ids" in case:
        yield f"run{several}", partial(session.run, case)
        yield f"token by token{several}", partial(_steps, session, case)
    else:
        yield f"prefill{several}", partial(session.run, case)
        for size in CHUNKS:
            yield f"chunks of {size}{several}", partial(session.run, case, chunk_size=size)
        yield f"token by token{several}", partial(session.run, case, chunk_size=1)


def _few(modes: Sequence[tuple[str, Run]], case: Case) -> Sequence[tuple[str, Run]]:
    """Return the first mode, and for a single row the last but one: chunks, where there are any."""
    return modes[:1] if len(next(iter(case.values()))) > 1 or len(modes) < 3 else [modes[0], modes[-2]]


def _steps(session: Any, case: Case) -> dict[str, Array]:
    """Return a sequence-to-sequence model's logits, the decoder fed one token at a time."""
    inputs = dict(case)
    ids = np.asarray(inputs.pop("decoder_input_ids"))
    cache = session.encode(inputs, max_length=ids.shape[1])
    steps = [session.step(ids[:, column : column + 1], cache) for column in range(ids.shape[1])]
    return {"logits": np.concatenate(steps, axis=1)}


def _check_swaps(session: Any, case: Case, first: dict[str | None, Mapping[str, Array]]) -> None:
    """Run the first case again with every adapter, in the reverse order, and compare the bits.

    Raises:
        ExportError: if an adapter does not give what it gave before another one was active.
    """
    for adapter in reversed(first):
        session.use(adapter)
        for output, array in session.run(case).items():
            if array.tobytes() != first[adapter][output].tobytes():
                raise ExportError(
                    f"output {output!r} of {_say(adapter)} is not the same after other adapters were active",
                    hint="this is a bug in the session; please report it",
                )


def _say(adapter: str | None) -> str:
    return "the base" if adapter is None else f"adapter {adapter!r}"
