"""One browser's visit to the page that measures: who it is, how far it is, and whether it is still there."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from edgeadapt.errors import UnfinishedError

_SILENCE_S = 90.0
"""A page in the background of a phone may run its timers once a minute only."""
_RECONNECT_S = 6.0
"""A browser opens a broken stream again after about 3 s."""


class Visit:
    """What the server's threads and the one that waits for figures share.

    client: the visitor's secret, "" before there is one; agent: how its browser calls itself
    progress: what it does at present: `stage`, `done`, `total`; partial: samples so far
    """

    def __init__(self) -> None:
        self.client = ""
        self.agent = ""
        self.progress: dict[str, Any] = {}
        self.partial: dict[str, Any] = {}
        self.stopped: str | None = None
        self._changed = threading.Condition()
        self._stages: list[str] = []
        self._outcome: dict[str, Any] | None = None
        self._left = False
        self._streams = 0
        self._seen_at = self._stream_lost_at = 0.0

    def claim(self, agent: str) -> str | None:
        """Return a secret for the first visitor, None for every other one."""
        with self._changed:
            if self.client:
                return None
            self.client, self.agent, self._seen_at = secrets.token_urlsafe(18), agent, monotonic()
            self._changed.notify_all()
            return self.client

    def tell(self, progress: dict[str, Any], partial: dict[str, Any]) -> None:
        """Note how far the visitor is."""
        with self._changed:
            self.progress, self.partial, self._seen_at = progress, partial, monotonic()
            self._stages.append(self._stage())
            self._changed.notify_all()

    def seen(self) -> None:
        """Note a sign of life."""
        self._seen_at = monotonic()

    def stream(self, change: int) -> None:
        """Count the visitor's open streams: 1 for a new one, -1 for one that broke."""
        with self._changed:
            self._streams += change
            self._stream_lost_at = monotonic()
            self._changed.notify_all()

    def leave(self) -> None:
        """Note that the visitor closed the page."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def end(self, outcome: dict[str, Any]) -> None:
        """Note the visitor's answer; the first one counts."""
        with self._changed:
            if self._outcome is None:
                self._outcome = outcome
            self._changed.notify_all()

    def stop(self, reason: str, within_s: float) -> None:
        """Have the page told that nobody waits any more, and wait until it was."""
        with self._changed:
            self.stopped = self.stopped or reason
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._streams == 0, within_s)

    @property
    def over(self) -> bool:
        """Whether nothing more is expected of the visitor."""
        return self._outcome is not None or self.stopped is not None

    def wait(
        self, timeout_s: float | None, *, where: str, watch: Callable[[], None], progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """Return the visitor's samples.

        Args:
            timeout_s: how long all may take, None for as long as it needs.
            where: what the visitor is, for messages.
            watch: raises what is wrong with the browser, where this process started it.
            progress: is told what the visitor does, each time that it changes.

        Raises:
            UnfinishedError: if nobody came, the visitor went away, time is over, or the measurement failed there.
        """
        end = None if timeout_s is None else monotonic() + timeout_s
        told = ""
        while True:
            with self._changed:
                self._changed.wait(0.2)
                outcome = self._outcome
                stages, self._stages = self._stages, []
            for stage in stages:
                if stage != told:
                    told = stage
                    progress(stage)
            if outcome is not None:
                return self._result(outcome)
            watch()
            self._check_presence(where)
            if end is not None and monotonic() > end:
                raise self._too_slow(where, timeout_s)

    def _stage(self) -> str:
        stage, done, total = (self.progress.get(name, "") for name in ("stage", "done", "total"))
        counted = isinstance(done, int) and isinstance(total, int) and total > 1
        return f"{stage} ({done + 1} of {total})" if counted else str(stage)

    def _result(self, outcome: dict[str, Any]) -> dict[str, Any]:
        if "error" in outcome:
            error = outcome["error"]
            partial = outcome.get("partial")
            raise UnfinishedError(
                str(error.get("message")),
                hint=str(error.get("hint")),
                partial=partial if isinstance(partial, dict) else {},
            )
        result: dict[str, Any] = outcome["result"]
        return result

    def _check_presence(self, where: str) -> None:
        if not self.client:
            return
        with self._changed:
            now = monotonic()
            silent = now - self._seen_at > _SILENCE_S
            broken = self._streams == 0 and self._stream_lost_at > 0
            gone = broken and min(now - self._stream_lost_at, now - self._seen_at) > _RECONNECT_S
            left = self._left
        if left or silent or gone:
            how = "closed the page" if left else "went away"
            raise UnfinishedError(
                f"{where} {how} while it measured ({self._stage() or 'at the beginning'})",
                hint="run the command again and keep the page open and in front until it says that it is done; a page "
                "that vanishes by itself ran out of memory",
                partial=self.partial,
            )

    def _too_slow(self, where: str, timeout_s: float | None) -> UnfinishedError:
        if not self.client:
            return UnfinishedError(
                f"{where} did not open the address within {timeout_s:g} s",
                hint="open the address in its browser; a phone reaches it by USB with --address, or in the local "
                "network with --listen",
                partial={},
            )
        return UnfinishedError(
            f"{where} was not done within {timeout_s:g} s ({self._stage()})",
            hint="allow more time, or fewer repeats or tokens",
            partial=self.partial,
        )
