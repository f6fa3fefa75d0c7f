"""edgeadapt: one bundle per configuration, adapters swapped in its slots, or promoted into patched weights.

Runs in the environment that runs the harness; the measured process imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

LABEL = "edgeadapt"
PACKAGES: tuple[tuple[str, ...], ...] = ()  # nothing to install: the harness runs in edgeadapt's environment
MODULES = ("numpy", "edgeadapt", "onnxruntime")
VERSIONS = ("edgeadapt", "onnxruntime", "numpy")
SWITCHES_AT_ONCE = True
WHOLE = False
EVERY = 1

EVERY_TEXT = 6
"""One of so many general texts, some 7000 tokens: with all of them an export takes minutes longer, and int4 is
hardly better (decision 0007)."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int8": {"flags": ["--quantize", "int8", "--patches"], "adapters": ["sql", "json"]},
    "int4": {"flags": ["--quantize", "int4", "--patches"], "adapters": ["sql", "json"], "calibration_samples": 40},
    "int8-qv8": {"flags": ["--quantize", "int8"], "adapters": ["qv8"]},
    "int4-qv8": {"flags": ["--quantize", "int4"], "adapters": ["qv8"]},
}
"""qv8: a LoRA of rank 8 on q and v alone, in a bundle of its own, because a bundle's graph has the sites of all its
adapters. calibration_samples: of each adapter's training examples, beside general texts; without, a file is not given,
and int4 is fitted to the texts that come with edgeadapt."""


def prepare(configuration: str, base: str, checkpoint: str, adapters: dict[str, str], folder: str) -> dict[str, Any]:
    """Export the bundle with the program, as a user would."""
    del checkpoint
    settings = CONFIGURATIONS[configuration]
    chosen = {name: adapters[name] for name in settings["adapters"]}
    names = [part for name in chosen for part in ("--name", name)]
    command = [sys.executable, "-m", "edgeadapt", "export", *chosen.values(), *names, "--base", base]
    command += ["-o", f"{folder}/model.bundle", *settings["flags"], "--force", "--json", "--quiet"]
    if count := settings.get("calibration_samples"):
        import calibration_texts

        samples = calibration_texts.general()[::EVERY_TEXT] + calibration_texts.task_samples("train", count)
        command += ["--calibrate", str(calibration_texts.write_lines(Path(folder) / "calibration.jsonl", samples))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    summary = json.loads(done.stdout)
    said = {key: summary[key] for key in ("bytes", "quality", "parity") if key in summary}
    return {**said, "patches": _patches(Path(folder) / "model.bundle")}


def files(folder: Path, adapter: str) -> dict[str, list[Path]]:
    """The files of the base and of one adapter, which its patch and its golden answers are not part of."""
    bundle = folder / "model.bundle"
    return {
        "base": [path for path in (bundle / "graph").rglob("*") if path.is_file()],
        "adapter": [bundle / "adapters" / adapter / "adapter.onnx_adapter"],
    }


def _patches(folder: Path) -> dict[str, dict[str, int]]:
    """Size and entropy of each adapter's patch."""
    import edgeadapt

    bundle = edgeadapt.open_bundle(folder)
    return {
        name: {"bytes": len(bundle.patch_bytes(name)), "entropy_bytes": bundle.patch(name).entropy_bytes}
        for name in bundle.adapter_names
        if bundle.has_patch(name)
    }


PROMOTED = "promoted:"


class Engine:
    """A session."""

    def __init__(self, configuration: str, folder: Path, threads: int, adapters: dict[str, str]) -> None:
        import edgeadapt

        del configuration
        self._bundle, self._threads = folder / "model.bundle", threads
        self._session: Any = edgeadapt.open_session(self._bundle, threads=threads)
        if adapters:
            self._session.use(next(iter(adapters)))
        self._session.prepare()  # graphs are opened when first needed; peers open theirs at load
        self._cache: Any = None
        self._token = 0

    def use(self, adapter: str | None) -> None:
        """Make an adapter active, from memory if it was active before; "promoted:NAME" in weights of its own."""
        if adapter is not None and adapter.startswith(PROMOTED):
            adapter = adapter.removeprefix(PROMOTED)
            self._session.promote(adapter, wait=True)
            self._session.use(adapter)
            if self._session.form != "promoted":
                raise RuntimeError(f"the session runs the form {self._session.form!r}")
            return
        self._session.use(adapter)

    def forget(self, adapter: str) -> None:
        """Drop an adapter's tensors."""
        self._session.evict(adapter)

    def prefill(self, ids: list[int], room: int) -> int:
        """Read a prompt into a new cache; the first token."""
        self._cache = self._session.new_cache(1, len(ids) + room)
        self._token = self._next(ids)
        return self._token

    def decode(self, count: int) -> list[int]:
        """`count` more tokens."""
        tokens = []
        for _ in range(count):
            self._token = self._next([self._token])
            tokens.append(self._token)
        return tokens

    def logits(self, ids: list[int]) -> Any:
        """Logits at every position."""
        import numpy as np

        cache = self._session.new_cache(1, len(ids))
        return self._session.step(np.asarray([ids], np.int64), cache, logits="all")[0]

    def mixed_batch(self, adapter: str, ids: list[int], rows: int, steps: int, runs: int) -> dict[str, list[float]]:
        """Seconds of `steps` tokens in `rows` rows, with one adapter in all and with one of its own in each.

        The further adapters are this one with its values scaled a little: as large, and different.
        """
        import numpy as np

        tensors = self._session.bundle.adapter_tensors(adapter)
        for row in range(rows):
            factor = np.float32(1 + row * 1e-3)
            self._session.lend(f"row-{row}", {name: value * factor for name, value in tensors.items()})
        kinds = {"one": ["row-0"] * rows, "own": [f"row-{row}" for row in range(rows)]}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for run in range(runs + 1):
            for kind, names in kinds.items():
                started = perf_counter()
                found = self._session.generate_batch(
                    [ids] * rows, adapters=names, max_new_tokens=steps, ignore_eos=True
                )
                if run:  # the first one warms up
                    seconds[kind].append(perf_counter() - started)
                if any(len(row.token_ids) != steps for row in found):
                    raise RuntimeError("rows ended early")
        return seconds

    def promotion(self, adapter: str, ids: list[int], before: int, after: int) -> dict[str, Any]:
        """Seconds since the call of `promote` at which each token came, in a session and a cache of their own.

        `before` tokens are decoded in slots, then the promotion is asked for, and decoding goes on until `after` tokens
        came in the promoted form. Also whether these tokens are those that slots alone would have given.
        """
        import edgeadapt

        with tempfile.TemporaryDirectory() as cache:
            os.environ["EDGEADAPT_CACHE_DIR"] = cache
            self._session = edgeadapt.open_session(self._bundle, threads=self._threads)
            self._session.use(adapter)
            tokens = [self.prefill(ids, 1024)]
            times, forms = [perf_counter()], [self._session.form]

            def step() -> None:
                tokens.extend(self.decode(1))
                times.append(perf_counter())
                forms.append(self._session.form)

            for _ in range(before):
                step()
            asked = perf_counter()
            self._session.promote(adapter)
            while forms.count("promoted") < after and len(tokens) < 1000:
                step()
            status = self._session.promotion(adapter)
            self._session.close()
            self._session = edgeadapt.open_session(self._bundle, threads=self._threads)
            self._session.use(adapter)
            slots = [self.prefill(ids, 1024), *self.decode(len(tokens) - 1)]
        if status.state != "promoted":
            raise RuntimeError(f"promotion is {status.state!r}: {status.error}")
        same = next((i for i, (a, b) in enumerate(zip(tokens, slots, strict=True)) if a != b), len(tokens))
        return {
            "seconds": status.seconds,
            "token_times_s": [time - asked for time in times],
            "forms": forms,
            "tokens": len(tokens),
            "same_as_slots": same,
        }

    def _next(self, ids: list[int]) -> int:
        import numpy as np

        logits = self._session.step(np.asarray([ids], np.int64), self._cache, logits="last")
        return int(logits[0, -1].argmax())
