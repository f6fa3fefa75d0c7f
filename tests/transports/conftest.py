"""Real servers and devices on this machine, each with an empty folder for its temporary files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgeadapt.device import Device
from edgeadapt.profiling import transports
from tests.transports import programs
from tests.transports.mini_adbd import Adbd
from tests.transports.sshd import PROGRAM as SSHD
from tests.transports.sshd import Sshd, free_port

KINDS = ("local", "ssh", "adb", "emulated", "simulated")
MISSING = "{} is not installed: scripts/install-test-tools could not, or was not run"


@dataclass(frozen=True)
class Target:
    """A device that can be connected to, and where the files of its programs appear on this machine."""

    device: Device
    temporary: Path

    def connect(self, **changes: object) -> transports.Transport:
        return transports.connect(replace(self.device, **changes))

    def left(self) -> list[str]:
        return sorted(path.name for path in self.temporary.iterdir())


def need(*found: object, what: str) -> None:
    if not all(found):
        pytest.skip(MISSING.format(what))


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    need(shutil.which("ssh"), Path(SSHD).is_file(), what="an OpenSSH client or server")
    server = Sshd(tmp_path / "sshd")
    monkeypatch.setenv("EDGEADAPT_SSH_CONFIG", str(server.client_config))
    yield server
    server.stop()


@pytest.fixture
def ssh(sshd: Sshd) -> Target:
    device = Device("pi", "a test", "cpu", transport="ssh", address="device", interpreter=sys.executable)
    return Target(device, sshd.temporary)


@pytest.fixture
def adb_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home and a port of adb's own: no server and no key of the user is touched."""
    need(shutil.which("adb"), what="adb")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    yield
    subprocess.run(["adb", "kill-server"], check=False, capture_output=True)


@pytest.fixture
def phone(tmp_path: Path, adb_environment: None) -> Iterator[Callable[..., Adbd]]:
    """Makes devices that adb can connect to."""
    made: list[Adbd] = []

    def make(**settings: object) -> Adbd:
        temporary = tmp_path / "phone"
        temporary.mkdir(exist_ok=True)
        made.append(Adbd({"PATH": os.environ["PATH"], "TMPDIR": str(temporary)}, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for device in made:
        device.stop()


@pytest.fixture
def adb(phone: Callable[..., Adbd], tmp_path: Path) -> Target:
    device = Device("phone", "a test", "cpu", transport="adb", address=phone().address, interpreter=sys.executable)
    return Target(device, tmp_path / "phone")


@pytest.fixture
def sysroot(root: Path) -> Path:
    """The folder of arm64's files, made when it is not there (half a minute, needs Debian's mirror and PyPI)."""
    need(shutil.which("qemu-aarch64-static"), shutil.which("apt-get"), what="qemu-user-static or apt-get")
    folder = Path(os.environ.get("EDGEADAPT_ARM64_SYSROOT", root / ".arm64-sysroot"))
    made = subprocess.run([root / "scripts" / "arm64-sysroot", folder], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"arm64's files cannot be fetched: {made.stderr.strip()}")
    return folder


def _here(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None = None) -> Target:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return Target(Device("it", "a test", "cpu", transport=transport, address=address), temporary)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    return _here("local", tmp_path, monkeypatch)


@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    return _here("simulated", tmp_path, monkeypatch)


@pytest.fixture
def emulated(sysroot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    return _here("emulated", tmp_path, monkeypatch, str(sysroot))


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest) -> Target:
    """Every kind of device in turn."""
    found: Target = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A program, a file of 3 MB, and names that a shell could misread."""
    folder = tmp_path / "what is sent"
    folder.mkdir()
    for name in ("TELL", "HANG", "HANG_SHELL", "KILL_ITSELF"):
        (folder / f"{name}.py").write_text(getattr(programs, name))
    (folder / "zeros").write_bytes(bytes(3_000_000))
    return {
        "tell.py": folder / "TELL.py",
        "hang.py": folder / "HANG.py",
        "hang.sh": folder / "HANG_SHELL.py",
        "kill itself.py": folder / "KILL_ITSELF.py",
        "data/zeros.bin": folder / "zeros",
        'data/it\'s $HOME; "x" (1).bin': folder / "zeros",
    }


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], None]]:
    """Makes folders disks of 2 MB, where this user may mount."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
