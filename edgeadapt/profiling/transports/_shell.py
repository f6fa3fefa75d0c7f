"""A device that is reached through a POSIX shell: what ssh and adb have in common.

One shell on the device, the keeper, makes a folder and waits for orders. When its input ends, be it by `close`, by a
lost network or because this process was killed, it kills what still runs and removes the folder. So files go away
also when nobody is left to ask for it.
"""

from __future__ import annotations

import queue
import secrets
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Completed, Transport, _failures
from edgeadapt.profiling.transports._process import decoded, end_process, run_process, start_process
from edgeadapt.profiling.transports._python import check_machine, machine_of
from edgeadapt.profiling.transports._tar import send_tar

_HELLO = "edgeadapt-keeper"
_START_S, _PROBE_S, _ANSWER_S, _REMOVE_S = 60.0, 120.0, 20.0, 60.0

# Each line is whole: they are joined with spaces, since csh takes no newline inside quotes. The folder is on a disk
# where there is one: /tmp is memory on many devices. Folders of keepers that died with their machine are removed
# (by its name: containers may share a disk).
# A process that runs is an empty file NUMBER-PID, which a full disk still takes. Its shell leads a process group (sshd
# and adbd make a session for each command), so that all that it started is killed with it. One that was just killed
# may still finish a file: the folder is removed once more.
_KEEPER = r"""
LC_ALL=C; export LC_ALL; umask 077; trap "" HUP INT PIPE TERM;
for base in "${TMPDIR:-}" /data/local/tmp /var/tmp /tmp;
do if [ -n "$base" ] && [ -d "$base" ] && [ -w "$base" ]; then break; fi; done;
for old in "$base"/edgeadapt-*/.keeper-*;
do pid=${old##*/.keeper-}; if [ "${pid#*-}" = "$(uname -n)" ] && ! kill -0 "${pid%%-*}" 2>/dev/null;
then rm -rf "${old%/*}"; fi; done;
root=$(mktemp -d "$base/edgeadapt-XXXXXXXX") && mkdir "$root/.running" || exit 1;
touch "$root/.keeper-$$-$(uname -n)" || exit 1;
echo "edgeadapt-keeper $(uname -m) $root";
halt() { touch "$root/.running/$1.stop";
for file in "$root/.running/"$1-*; do pid=${file##*-};
case $pid in *[!0-9]*) ;; *) kill -KILL "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null;; esac; done; };
while read -r verb number; do case $verb in
stop) halt "$number"; echo "stopped $number";;
close) break;; esac; done;
halt "[0-9]*"; cd /; { rm -rf "$root" || { sleep 1; rm -rf "$root"; }; } 2>/dev/null && echo closed;
""".replace("\n", " ")


class Shell:
    """A folder on the device, and programs that run beside it.

    machine: what `uname -m` says; folder: its path there
    program: returns the program of this machine that runs a line of shell there
    """

    def __init__(
        self,
        keep: Callable[[str], Sequence[str]],
        command: Callable[[str], Sequence[str]],
        where: str,
        explain: Callable[[str], ProfileError],
    ) -> None:
        """Start the keeper.

        Args:
            keep: returns the program of this machine that connects and runs the keeper, a line of shell, on the device.
            command: returns the program that runs any other line of shell there.
            where: the device in messages.
            explain: returns the error for what that program said when it could not connect.

        Raises:
            ProfileError: if the device cannot be reached or has no writable folder.
        """
        self.program = command
        self._where = where
        self._mark = secrets.token_hex(8)
        self._runs = 0
        self._told_lost = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the keeper runs
        self._keeper = start_process(keep(f"exec sh -c {shlex.quote(_KEEPER)}"), stderr=self._stderr)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.machine, self.folder = self._greeted(explain)
        except BaseException:
            end_process(self._keeper)
            self._stderr.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the connection still stands, as far as the program of this machine knows."""
        return self._keeper.poll() is None

    def run(self, arguments: Sequence[str], *, cwd: str, stdin: str, timeout_s: float | None) -> Completed:
        """Run a program there; see `Transport.run`."""
        self._runs += 1
        running = shlex.quote(f"{self.folder}/.running/{self._runs}")
        script = (
            f"TMPDIR={shlex.quote(self.folder)}; export TMPDIR; "  # what libraries leave behind goes with it
            f"cd {shlex.quote(cwd)} && touch {running}-$$ && ! [ -e {running}.stop ] || exit 125; "
            f"echo {self._mark}; {shlex.join(arguments)}; status=$?; rm -f {running}-$$; echo {self._mark} $status"
        )
        try:
            done = self.command(f"exec sh -c {shlex.quote(script)}", stdin=stdin, timeout_s=timeout_s)
        except subprocess.TimeoutExpired as error:
            self._stop(self._runs)
            raise _failures.too_slow(arguments, self._where, timeout_s or 0) from error
        except BaseException:
            with suppress(ProfileError):
                self._stop(self._runs)
            raise
        # What the user's shell prints stands before the first mark; without the second one the end was cut off, which
        # adb's exit status does not always tell.
        _, _, said = done.stdout.partition(self._mark + "\n")
        out, ended, status = said.rpartition(self._mark)
        if not ended:
            self.require_alive()
            raise ProfileError(
                f"{self._where} ended {arguments[0]} without a word: {_failures.reason_in(done.stderr)}",
                hint="it may have too little memory, or the sent files were removed there; run the command again",
            )
        return Completed(_signalled(int(status)), out, done.stderr)

    def probe(self, arguments: Sequence[str]) -> Completed:
        """Run a program there that answers soon."""
        return self.run(arguments, cwd=self.folder, stdin="", timeout_s=_PROBE_S)

    def command(self, line: str, *, stdin: str = "", timeout_s: float | None = None) -> Completed:
        """Run a line of shell there and wait for its end.

        Raises:
            ProfileError: if the device is lost.
            subprocess.TimeoutExpired: if it took longer; only the program of this machine is gone then.
        """
        if not self.alive:
            raise self.lost()
        done = run_process(self.program(line), stdin=stdin, timeout_s=timeout_s)
        if done.returncode != 0:
            self.require_alive()
        return done

    def require_alive(self) -> None:
        """Check that a failure was not the connection's.

        Raises:
            ProfileError: if the device is lost.
        """
        with suppress(subprocess.TimeoutExpired):  # its end may be noticed a little later than that of a command
            self._keeper.wait(0.5)
            raise self.lost()

    def lost(self) -> ProfileError:
        """Return the error that tells the loss of the device."""
        self._told_lost = True
        return _failures.lost(self._where)

    def close(self) -> bool:
        """End the keeper; return whether it said that all is removed, or the loss of the device was told before."""
        if self._stderr.closed:
            return True
        try:
            removed = self._tell("close") and self._answer("closed", _REMOVE_S) is not None
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(_ANSWER_S if removed else 1)
        finally:
            end_process(self._keeper)
            self._stderr.close()
        return removed or self._told_lost

    def _read(self) -> None:
        assert self._keeper.stdout is not None
        with suppress(ValueError, OSError):  # closed meanwhile
            for line in self._keeper.stdout:
                self._lines.put(decoded(line).strip())
        self._lines.put(None)

    def _answer(self, first_word: str, wait_s: float) -> str | None:
        """Return the keeper's next line that begins so, or None if it has ended or said nothing for too long."""
        deadline = monotonic() + wait_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - monotonic()))
            except queue.Empty:
                return None
            if line is None:
                self._lines.put(None)  # for the next question
                return None
            if line.split(" ", 1)[0] == first_word:
                return line

    def _tell(self, order: str) -> bool:
        assert self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(order.encode() + b"\n")
            self._keeper.stdin.flush()
        except OSError:
            return False
        return True

    def _stop(self, number: int) -> None:
        if not self._tell(f"stop {number}") or self._answer("stopped", _ANSWER_S) is None:
            raise self.lost()

    def _greeted(self, explain: Callable[[str], ProfileError]) -> tuple[str, str]:
        """Return the keeper's machine and folder."""
        hello = self._answer(_HELLO, _START_S)
        if hello is not None:
            _, machine, folder = hello.split(" ", 2)
            return machine, folder
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(1)  # what it had to say is then complete
        self._stderr.seek(0)
        text = decoded(self._stderr.read())
        if "mktemp" in text or _failures.is_full(text):
            raise ProfileError(
                f"{self._where} has no folder to write to: {_failures.reason_in(text)}",
                hint="free some space there, or point TMPDIR on the device to a folder that its user may write to",
            )
        raise explain(text)


class ShellTransport(Transport):
    """A transport whose constructor calls `open`, inside `closed_on_error`.

    where: the device in messages
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._shell: Shell | None = None
        self._folders = 0

    def open(
        self,
        device: Device,
        keep: Callable[[str], Sequence[str]],
        command: Callable[[str], Sequence[str]],
        explain: Callable[[str], ProfileError],
        *,
        without_python: str = "",
    ) -> None:
        """Start the keeper (see `Shell`) and check the device's Python (see `machine_of`).

        Raises:
            ProfileError: if the device cannot be reached, or is not what its file says.
        """
        self._shell = Shell(keep, command, self.where, explain)
        self.interpreter = device.interpreter or "python3"
        self.machine = machine_of(self.interpreter, self.where, self._shell.probe, without_python=without_python)
        check_machine(device, self.machine, self.where)
        self.emulated = self.machine != self._shell.machine

    @property
    def shell(self) -> Shell:
        """The keeper's shell, until `close`."""
        assert self._shell is not None, "it is closed"
        return self._shell

    def send(self, files: Mapping[str, Path]) -> str:
        """Copy files into a fresh folder; half of them do not stay."""
        _failures.check_files(files)
        if not self.shell.alive:
            raise self.shell.lost()
        self._folders += 1
        folder = f"{self.shell.folder}/{self._folders}"
        complaints = self.fill(folder, files)
        if complaints is not None:
            self.shell.require_alive()
            self.shell.command(f"rm -rf {shlex.quote(folder)}")
            raise _failures.not_written(files, folder, self.where, complaints)
        return folder

    def fill(self, folder: str, files: Mapping[str, Path]) -> str | None:
        """Make a folder of these files, here by tar; return what the device complained of if it did not take them."""
        quoted = shlex.quote(folder)
        unpack = f"LC_ALL=C; export LC_ALL; mkdir {quoted} && exec tar -xf - -C {quoted}"
        return send_tar(files, self.shell.program(f"exec sh -c {shlex.quote(unpack)}"))

    def run(self, arguments: Sequence[str], *, cwd: str, stdin: str = "", timeout_s: float | None = None) -> Completed:
        """Run a program in a shell of the device."""
        return self.shell.run(arguments, cwd=cwd, stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        """End the keeper, which removes everything."""
        shell, self._shell = self._shell, None
        if shell is not None and not shell.close():
            raise _failures.left_behind(shell.folder, self.where)


def _signalled(status: int) -> int:
    """Return -n for a program that signal n ended, which a shell tells as 128 + n."""
    return 128 - status if 128 < status < 128 + signal.NSIG else status
