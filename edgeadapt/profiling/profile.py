"""Measuring a bundle on a device: a job is made, sent, and run there, one process for each kind of measurement."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeadapt import registry
from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.device import Device, read_device
from edgeadapt.errors import ProfileError, UnfinishedError
from edgeadapt.profiling import launch
from edgeadapt.profiling.assemble import assemble, attempt_of, noise_score
from edgeadapt.profiling.figures import Attempt, Profile
from edgeadapt.profiling.job import Shapes, write_job
from edgeadapt.profiling.kept_models import check_converts, converts, prepared_models
from edgeadapt.profiling.transports import Invitation, Transport, connect
from edgeadapt.profiling.workload import Workload
from edgeadapt.progress import SILENT, Progress

RUNTIMES = "edgeadapt.profiling.runtimes"
_BESIDE = ("memory", "cold")
"""What is measured after the timed figures, each in a process of its own."""


def profile(
    bundle: Path | str,
    *,
    device: Device | str = "cpu",
    adapter: str | None = None,
    threads: int | None = None,
    prompt_tokens: int | Sequence[int] = 128,
    new_tokens: int = 64,
    repeats: int = 5,
    batch_size: int = 1,
    runtime: str | None = None,
    models: Path | None = None,
    operators: bool = False,
    attempts: int = 2,
    timeout_s: float | None = None,
    announce: Callable[[Invitation], None] | None = None,
    progress: Progress = SILENT,
) -> Profile:
    """Return how fast and how large a bundle is on a device.

    Args:
        bundle: a bundle's folder.
        device: a device, or its name in devices/.
        adapter: what is active in the main figures, None for the base. Tax and swap are measured for it, or for the
            bundle's first adapter.
        threads: intra-op threads, None for the device's number or one per core that may be used.
        prompt_tokens: how long a prompt is, or several lengths, of which the first one's text goes on (single pass: how
            long a text is, at most the model's longest).
        new_tokens: how many tokens are written after it.
        repeats: how many answers are written; a single pass is run ten times as often.
        batch_size: rows at once.
        runtime: one of edgeadapt/profiling/runtimes, None for the device's own.
        models: a folder where the models that are made for the runtime are kept, and from which they are taken if they
            are there: see `kept_models`. None keeps none.
        operators: time each operator too, in a process of its own.
        attempts: how often the timed figures are tried while other work disturbs them; the quietest try is reported.
        timeout_s: how long each process may take, None for as long as it needs.
        announce: is told where a person has to go, for a device that somebody has to open a page on.
        progress: is told what goes on.

    Raises:
        ProfileError: if the device or the runtime cannot be used, an argument is out of range, or nothing could be
            timed; if `models` holds others, or nothing is made for the runtime. What fails after that is in the
            profile's `failures`.
        BundleError: if it is no bundle, or has no such adapter.
        RecipeError: if there is no such device.
    """
    check_count("attempts", attempts)
    workload = read_workload(prompt_tokens, new_tokens, repeats, batch_size)
    with prepared(
        bundle,
        workload,
        device=device,
        adapter=adapter,
        threads=threads,
        runtime=runtime,
        models=models,
        timeout_s=timeout_s,
        announce=announce,
        progress=progress,
    ) as run:
        return run.measure(operators=operators, attempts=attempts, progress=progress)


@contextmanager
def prepared(
    bundle: Path | str,
    workload: Workload,
    *,
    device: Device | str,
    adapter: str | None,
    threads: int | None,
    runtime: str | None,
    timeout_s: float | None,
    announce: Callable[[Invitation], None] | None,
    progress: Progress,
    models: Path | None = None,
) -> Iterator[Prepared]:
    """Give a bundle that lies on a device, ready to be measured as often as is wanted; arguments as for `profile`.

    Raises:
        ProfileError: if the device or the runtime cannot be used, or an argument is out of range.
        BundleError: if it is no bundle, or has no such adapter.
        RecipeError: if there is no such device.
    """
    chosen, name, module = check_device(device, runtime)
    opened = open_bundle(bundle)
    check_count("threads", 1 if threads is None else threads)
    active, tax_adapter = _adapters(opened, adapter)
    if models is not None:
        check_converts(module)
    with connect(chosen) as transport, tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        transport.announce = announce
        measured = replace(chosen, threads=threads or chosen.threads)
        job = _Job(workload, active, tax_adapter)
        run = Prepared(opened, measured, name, module, transport, Path(folder), timeout_s, job, models)
        with progress.stage("prepare the models"):
            run.prepare()
        yield run


def check_device(device: Device | str, runtime: str | None) -> tuple[Device, str, ModuleType]:
    """Return a device, and the runtime to use there with its name: the device's own for None.

    Raises:
        ProfileError: if the runtime cannot be used there.
        RecipeError: if there is no such device.
    """
    chosen = read_device(device) if isinstance(device, str) else device
    if chosen.listen is not None and chosen.transport != "phone":
        raise ProfileError(
            f"device {chosen.name!r} opens no page, so there is nothing to listen on {chosen.listen!r} for",
            hint="leave --listen out, or choose --device phone",
        )
    name = (runtime or chosen.runtime).replace("-", "_")  # a file's name, which people write as ort-mobile
    module = registry.load(RUNTIMES, name, ProfileError)
    own: Any = getattr(module, "interpreter", None)  # runtimes that want a Python of their own
    if own is not None and chosen.transport == "local" and chosen.interpreter is None:
        chosen = replace(chosen, interpreter=own())
    module.require(chosen)
    return chosen, name, module


@dataclass(frozen=True)
class _Job:
    """What is run: see `write_job`."""

    workload: Workload
    active: str | None
    tax_adapter: str | None


@dataclass
class Prepared:
    """A bundle on a device."""

    bundle: Bundle
    device: Device
    runtime: str
    module: ModuleType
    transport: Transport
    folder: Path
    timeout_s: float | None
    job: _Job
    models: Path | None

    def prepare(self) -> None:
        """Make what the runtime opens, and send it."""
        self._ask = self._prepared(self.module, self.folder / "job", self.models)

    def _prepared(self, module: ModuleType, folder: Path, kept: Path | None) -> Callable[[str], dict[str, Any]]:
        """Return what runs one measurement by its name."""
        folder.mkdir()
        work = self.job.workload
        longest = max(work.prompt_tokens)
        shapes = Shapes(work.batch_size, longest, longest + work.new_tokens, work.prompt_tokens)
        models = prepared_models(module, self.bundle, self.device, folder, shapes, kept=kept)
        write_job(
            folder,
            self.bundle,
            models,
            work,
            engine=module.ENGINE,
            active=self.job.active,
            tax_adapter=self.job.tax_adapter,
            through_session=module.ENGINE == "session",
        )
        own: Any = getattr(module, "measure", None)  # a runtime that is no Python program starts itself
        if own is not None:
            return partial(own, folder, self.transport, self.timeout_s)
        return partial(
            launch.measure,
            self.transport,
            launch.send_job(self.transport, folder, module.ENGINE, getattr(module, "BESIDE", ())),
            install=module.INSTALL,
            timeout_s=self.timeout_s,
            same_clock=self.device.transport == "local",
        )

    def _operators(self) -> dict[str, Any]:
        """Time operators, in another runtime where this one leaves it to that."""
        name = getattr(self.module, "OPERATORS", None)
        if name is None:
            return self._ask("operators")
        module = registry.load(RUNTIMES, name, ProfileError)
        return self._prepared(module, self.folder / "operators", None)("operators")

    def measure(
        self, *, operators: bool, attempts: int, progress: Progress, beside: Sequence[str] | None = None
    ) -> Profile:
        """Run the measurements one after the other; what fails after the first one is told, and the rest is kept.

        Args:
            operators: time each operator too.
            attempts: how often the timed figures are tried while other work disturbs them.
            progress: is told what goes on.
            beside: which of the runtime's measurements follow the timed figures, None for all.
        """
        found: dict[str, Any] = {}
        tries: tuple[Attempt, ...] = ()
        failures: list[str] = []
        if self.transport.emulated:
            with progress.stage("check the answers"):
                found = self._ask("checks")
            kinds: tuple[str, ...] = ()
        else:
            with progress.stage("time it"):
                found, tries, failure = self._timed(attempts)
            failures += failure
            known = () if failure else getattr(self.module, "KINDS", _BESIDE)
            kinds = tuple(what for what in known if beside is None or what in beside)
            kinds += ("operators",) if operators and not failure else ()
        for what in kinds:
            try:
                with progress.stage(f"measure {what}"):
                    more = self._operators() if what == "operators" else self._ask(what)
            except ProfileError as error:
                failures.append(f"{what}: {error.message}")
                continue
            notes = dict.fromkeys((*found["notes"], *more["notes"]))
            found = {**more, **found, "notes": list(notes)}
        models = self.folder / "job" / "model"
        return assemble(
            self.bundle,
            self.device,
            self.runtime,
            self.job.workload,
            found,
            adapter=self.job.active,
            emulated=self.transport.emulated,
            attempts=tries,
            models=models if converts(self.module) else None,
            failures=tuple(failures),
        )

    def _timed(self, attempts: int) -> tuple[dict[str, Any], tuple[Attempt, ...], list[str]]:
        """Return the samples of the quietest of at most `attempts` tries, how all went, and what ended the first early.

        A try that ends early is kept if it has a latency; the device is likely to be gone, so nothing follows it.
        """
        tries: list[tuple[Attempt, dict[str, Any]]] = []
        while len(tries) < attempts:
            try:
                samples = self._ask("speed")
            except UnfinishedError as error:
                if tries or not error.partial.get("latency_s"):
                    raise
                return error.partial, (attempt_of(error.partial),), [f"speed: {error.message}"]
            tries.append((attempt_of(samples), samples))
            if not tries[-1][0].disturbed_by:
                break
        best = min(tries, key=lambda each: noise_score(each[0]))
        return best[1], tuple(attempt for attempt, _ in tries), []


def read_workload(prompt_tokens: int | Sequence[int], new_tokens: int, repeats: int, batch_size: int) -> Workload:
    """Return what is run.

    Raises:
        ProfileError: if a number is out of range.
    """
    lengths = (prompt_tokens,) if isinstance(prompt_tokens, int | float) else tuple(prompt_tokens)
    if not lengths or len(set(lengths)) != len(lengths):
        raise ProfileError(f"prompt_tokens is {list(lengths)}", hint="give one length or several different ones")
    for length in lengths:
        check_count("prompt_tokens", length)
    for name, value in (("new_tokens", new_tokens), ("repeats", repeats), ("batch_size", batch_size)):
        check_count(name, value)
    return Workload(lengths, new_tokens, repeats, batch_size)


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number of 1 or more.

    Raises:
        ProfileError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProfileError(f"{name} is {value!r}", hint="give a whole number of 1 or more")


def _adapters(bundle: Bundle, adapter: str | None) -> tuple[str | None, str | None]:
    """Return which adapter is active, and whose tax and swap are measured."""
    merged = bundle.manifest.merged
    if merged is not None:
        if adapter not in (None, merged):
            raise ProfileError(
                f"adapter {adapter!r} cannot be used: {merged!r} is merged into the weights of this bundle",
                hint="leave --adapter out",
            )
        return merged, None
    if adapter is not None:
        bundle.adapter_record(adapter)
    first = bundle.adapter_names[0] if bundle.adapter_names else None
    return adapter, adapter or first
