"""The side of a measurement that waits for a phone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import phone

DEVICE = Device("phone", "a phone", "wasm", runtime="web", threads=2)
ENDLESS = {"prompt_tokens": [5], "new_tokens": 3, "repeats": 10**6, "batch_size": 1, "swaps": 1}


class Measuring:
    """`phone.measure` in a thread, as the command line waits while somebody handles the phone."""

    def __init__(self, job: Path, *, listen: str | None = None, address: str | None = None, timeout_s: float = 300):
        self._invited = threading.Event()
        self.stages: list[str] = []
        self.found: Any = None

        def announce(invitation: phone.Invitation) -> None:
            self.invitation = invitation
            self._invited.set()

        def run() -> None:
            try:
                self.found = phone.measure(
                    job, listen, address, timeout_s, announce, title="my bundle", progress=self.stages.append
                )
            except ProfileError as error:
                self.found = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    @property
    def url(self) -> str:
        assert self._invited.wait(60)
        return self.invitation.url

    def wait_for_texts(self) -> None:
        """Wait until the phone has told of two texts at least, so that there are samples."""
        end = time.monotonic() + 120
        while sum(stage.startswith("texts (") for stage in self.stages) < 2:
            assert time.monotonic() < end, self.stages
            time.sleep(0.05)

    def result(self) -> Any:
        self._thread.join(300)
        assert not self._thread.is_alive()
        return self.found
