"""An adapter in weights of its own, made in the background from its patch, while the slots graph serves.

Beside the base an adapter costs time at every token; merged into weights it costs none. `Promoter` applies the patch
that the export made (`bundle/patch.py`) to a copy of the weights in the cache, opens it, and lets the session know.
The two forms are the same model but for rounding: the slots graph adds the float adapter to rounded weights, the
promoted form has weights that were rounded with the adapter in them.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.patch_files import write_patched
from edgeadapt.bundle.rules import patch_path
from edgeadapt.errors import EdgeAdaptError, SessionError
from edgeadapt.runtime.cache import AdapterKey
from edgeadapt.runtime.checks import is_whole
from edgeadapt.runtime.device_cache import cached_entry
from edgeadapt.runtime.ort import OrtGraph

Graphs = Mapping[str, OrtGraph]
State = Literal["slots", "preparing", "promoted", "failed"]


@dataclass(frozen=True)
class Promotion:
    """How far an adapter's promotion is.

    state: "slots" (not promoted), "preparing", "promoted", or "failed"
    seconds: from the call to the opened graphs; None before
    error: what went wrong, or None
    """

    adapter: str
    state: State
    seconds: float | None = None
    error: Exception | None = None


class Promoter:
    """The promotions of one session: one worker thread, at most `max_bytes` of promoted weights open.

    Its public methods are for the session's thread.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Callable[[Path], OrtGraph],
        *,
        max_bytes: int | None = None,
        after_tokens: int | None = None,
    ) -> None:
        for name, value in (("promoted_max_bytes", max_bytes), ("promote_after", after_tokens)):
            if value is not None and not is_whole(value, 1):
                raise SessionError(f"{name} is {value!r}", hint="give a whole number of 1 or more, or None")
        self._bundle = bundle
        self._open_graph = open_graph
        self._each = sum(record.size for record in bundle.manifest.files.values() if record.role == "weights")
        self._max_bytes = 2 * self._each if max_bytes is None else max_bytes
        self._after = after_tokens
        self._tokens: dict[str, int] = {}
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()  # of `_jobs` and what is in them
        self._worker: ThreadPoolExecutor | None = None

    def start(self, adapter: str, *, keep: AdapterKey) -> None:
        """Begin to prepare an adapter, unless that is done or under way; a failed one is tried again.

        Args:
            adapter: its name in the bundle.
            keep: what is active: its graphs are not closed to make room.

        Raises:
            BundleError: if there is no such adapter, or it has no patch.
            SessionError: if its weights alone take more than the session may open.
        """
        self._bundle.require_patch(adapter)
        if self._each > self._max_bytes:
            raise SessionError(
                f"promoted weights take {self._each} bytes, and promoted_max_bytes is {self._max_bytes}",
                hint="open the session with a larger promoted_max_bytes, or leave it out",
            )
        with self._lock:
            job = self._jobs.get(adapter)
            if job is not None and job.state in {"preparing", "promoted"}:
                return
            self._make_room(keep)
            job = self._jobs[adapter] = _Job(adapter)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="promotion")
        self._worker.submit(self._prepare, job)

    def wait(self, adapter: str) -> None:
        """Return when a promotion is ready; raise what it failed with."""
        job = self._jobs[adapter]
        job.done.wait()
        job.told = True
        if job.error is not None:
            raise job.error

    def stop(self, adapter: str) -> None:
        """Cancel a promotion, or close its graphs; nothing happens where there is none."""
        with self._lock:
            job = self._jobs.pop(adapter, None)
        self._tokens.pop(adapter, None)
        if job is not None:
            job.cancelled.set()

    def close(self) -> None:
        """Cancel everything and wait for the worker's end."""
        for adapter in list(self._jobs):
            self.stop(adapter)
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None

    def status(self, adapter: str) -> Promotion:
        """Return how far an adapter's promotion is."""
        with self._lock:
            job = self._jobs.get(adapter)
            if job is None:
                return Promotion(adapter, "slots")
            job.told = job.told or job.error is not None
            return Promotion(adapter, job.state, job.seconds, job.error)

    def graphs(self, key: AdapterKey) -> Graphs | None:
        """Return the plain graphs by role of what is active, if that is one promoted adapter."""
        if not self._jobs:
            return None
        self._tell()
        if len(key) != 1 or key[0][1] != 1.0:
            return None
        with self._lock:
            job = self._jobs.get(key[0][0])
            if job is None or job.state != "promoted":
                return None
            job.used_at = time.monotonic()
            return job.graphs

    def count(self, key: AdapterKey, tokens: int) -> None:
        """Count tokens of what is active, and promote it once there are enough, if that was asked for."""
        if self._after is None or len(key) != 1 or key[0][1] != 1.0:
            return
        adapter = key[0][0]
        before = self._tokens.get(adapter, 0)
        self._tokens[adapter] = before + tokens
        if before < self._after <= before + tokens and self._bundle.has_patch(adapter):
            self.start(adapter, keep=key)

    def _prepare(self, job: _Job) -> None:
        """Run in the worker thread."""
        try:
            job.check()
            folder = self._patched_folder(job)
            graphs = {}
            for role, record in self._bundle.manifest.graphs.items():
                job.check()
                graphs[role] = self._open_graph(folder / Path(record.plain).name)
            with self._lock:
                job.check()
                job.graphs, job.seconds, job.state = graphs, time.monotonic() - job.started_at, "promoted"
        except _CancelledError:
            pass
        except Exception as error:  # noqa: BLE001 - it is raised or told of in the session's thread
            with self._lock:
                job.error, job.state = error, "failed"
        finally:
            job.done.set()

    def _patched_folder(self, job: _Job) -> Path:
        files = self._bundle.manifest.files
        graphs = [graph.plain for graph in self._bundle.manifest.graphs.values()]
        weights = [path for path, record in files.items() if record.role == "weights"]
        paths = [patch_path(job.adapter), *weights, *graphs]

        def make(folder: Path) -> Mapping[str, str]:
            return write_patched(self._bundle, job.adapter, folder, check=job.check)

        needed_bytes = self._each + sum(files[path].size for path in graphs)
        return cached_entry({path: files[path].sha256 for path in paths}, make, needed_bytes=needed_bytes)

    def _make_room(self, keep: AdapterKey) -> None:
        """Close the graphs that were not used for longest, so that one more adapter fits; under the lock.

        Raises:
            SessionError: if those that stay leave no room.
        """
        active = {name for name, _ in keep}
        held = [job for job in self._jobs.values() if job.state in {"preparing", "promoted"}]
        idle = sorted(
            (job for job in held if job.state == "promoted" and job.adapter not in active), key=lambda job: job.used_at
        )
        while (len(held) + 1) * self._each > self._max_bytes:
            if not idle:
                raise SessionError(
                    f"promoted weights take {self._each} bytes, promoted_max_bytes is {self._max_bytes}, and "
                    f"{', '.join(repr(job.adapter) for job in held)} is in use",
                    hint="use another adapter or demote that one first, or open the session with a larger one",
                )
            held.remove(idle[0])
            del self._jobs[idle.pop(0).adapter]

    def _tell(self) -> None:
        """Let the session's user know of failures that nobody has asked about."""
        for job in list(self._jobs.values()):
            if job.error is None or job.told:
                continue
            job.told = True
            if not isinstance(job.error, EdgeAdaptError):
                raise job.error
            warnings.warn(
                f"adapter {job.adapter!r} stays in the slots graph: {job.error.message}; {job.error.hint}", stacklevel=4
            )


class _CancelledError(Exception):
    """A promotion is no longer wanted."""


class _Job:
    """One adapter's promotion; `told`: somebody has seen the error."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.state: State = "preparing"
        self.graphs: Graphs = {}
        self.seconds: float | None = None
        self.error: Exception | None = None
        self.told = False
        self.started_at = self.used_at = time.monotonic()
        self.cancelled = threading.Event()
        self.done = threading.Event()

    def check(self) -> None:
        """Raise if the promotion is no longer wanted."""
        if self.cancelled.is_set():
            raise _CancelledError
