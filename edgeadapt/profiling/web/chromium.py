"""Chromium without a window, as this machine has it: started with an address, killed in the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from edgeadapt.errors import ProfileError

BROWSER_VARIABLE = "EDGEADAPT_BROWSER"
INSTALL = "apt install chromium (Debian, Ubuntu), or set EDGEADAPT_BROWSER to a Chromium or Chrome"

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_FLAGS = (
    "--headless=new",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-dev-shm-usage",  # small in containers
    "--disable-extensions",
    "--disable-features=SpareRendererForSitePerProcess,Translate",  # one renderer: memory is easier to tell
    "--disable-renderer-backgrounding",
    "--disable-sync",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
)
_WITHOUT_GPU = ("--disable-gpu",)
_WITH_GPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--ignore-gpu-blocklist")
_SOFTWARE_GPU = ("--use-webgpu-adapter=swiftshader", "--enable-unsafe-swiftshader")
_GOES_S = 5.0


def find_browser() -> Path:
    """Return this machine's Chromium or Chrome.

    Raises:
        ProfileError: if there is none.
    """
    named = os.environ.get(BROWSER_VARIABLE)
    found = [shutil.which(name) for name in ((named,) if named else _NAMES)]
    places = [] if named else [place for place in _PLACES if Path(place).exists()]
    for path in (*found, *places):
        if path is not None:
            return Path(path)
    what = f"{BROWSER_VARIABLE} names {named}, which is no program" if named else "no Chromium or Chrome was found"
    raise ProfileError(what, hint=INSTALL)


def has_gpu(sys_folder: Path = Path("/dev/dri")) -> bool:
    """Return whether this machine shows a GPU that a browser could use; without one WebGPU runs in software."""
    return any(sys_folder.glob("renderD*")) or Path("/dev/nvidiactl").exists() or not Path("/proc").exists()


class Chromium:
    """A browser that shows one page, in a profile folder of its own that is removed in the end."""

    def __init__(self, url: str, *, gpu: bool = False, flags: tuple[str, ...] = ()) -> None:
        """Start it.

        Args:
            url: the page.
            gpu: whether the page may use WebGPU, in software where there is no GPU.
            flags: further ones of the command line.

        Raises:
            ProfileError: if there is no browser, or it cannot be started.
        """
        program = find_browser()
        self._profile = tempfile.TemporaryDirectory(prefix="edgeadapt-browser-", ignore_cleanup_errors=True)
        self._log = Path(self._profile.name) / "stderr.txt"
        graphics = (*_WITH_GPU, *(() if has_gpu() else _SOFTWARE_GPU)) if gpu else _WITHOUT_GPU
        # root has no sandbox; everybody else keeps it
        sandbox = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        profile = f"--user-data-dir={self._profile.name}/profile"
        command = [str(program), *_FLAGS, *graphics, *sandbox, *flags, profile, url]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, "TMPDIR": self._profile.name},  # what it leaves behind goes with the rest
                )
        except OSError as error:
            self._profile.cleanup()
            raise ProfileError(f"{program} cannot be started: {error.strerror}", hint=INSTALL) from error

    def check(self) -> None:
        """Raise what is wrong, if the browser is gone.

        Raises:
            ProfileError: with what it said last.
        """
        status = self._process.poll()
        if status is None:
            return
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()][-2:]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
        raise ProfileError(
            f"the browser {how} before the measurement was over: {' | '.join(said) or 'it said nothing'}",
            hint="if it was killed, the machine may have too little memory; in a container it may need to run as root",
        )

    @property
    def pid(self) -> int:
        """The browser's own process; those of its pages are below it."""
        return self._process.pid

    def close(self) -> None:
        """Kill the browser and all that it started, and remove its folder."""
        self._process.terminate()
        try:
            self._process.wait(_GOES_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its group is its own: nobody else is in it
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
