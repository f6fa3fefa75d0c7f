"""Progress on stderr: a bar for the stage at work, a line with its time for every finished one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeadapt.cli import output
from edgeadapt.cli.interrupts import raise_lost
from edgeadapt.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextmanager
def reporter(*, quiet: bool) -> Iterator[Progress]:
    """Give a listener that shows stages on stderr, or, if `quiet`, only warnings."""
    if quiet:
        yield _Warnings()
        return
    with _bars() as bars:
        yield _Terminal(bars)


class _Warnings:
    """Shows what people should know, and no progress."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:  # noqa: ARG002 - the protocol's names
        yield
        raise_lost()

    def advance(self, done: int, total: int) -> None:  # noqa: ARG002 - the protocol's names
        raise_lost()

    def note(self, message: str) -> None:
        output.warning(message)


class _Terminal:
    """Shows stages; in a terminal the ones at work have a moving bar."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._open: list[TaskID] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        depth = len(self._open)
        task = self._bars.add_task("  " * depth + name, total=None)
        self._open.append(task)
        outcome = "stopped"
        try:
            yield
            raise_lost()
            outcome = ""
        finally:
            self._open.pop()
            self._bars.remove_task(task)
            self._line(depth, name, time.perf_counter() - started_s, outcome)

    def advance(self, done: int, total: int) -> None:
        raise_lost()
        if self._open:
            self._bars.update(self._open[-1], completed=done, total=total)

    def note(self, message: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)

    def _line(self, depth: int, name: str, elapsed_s: float, outcome: str) -> None:
        from rich.text import Text

        ending = f"  {outcome}" if outcome else ""
        style = "red" if outcome else "green"
        text = Text.assemble((f"{elapsed_s:7.1f} s", style), f"  {'  ' * depth}{name}{ending}")
        self._bars.console.print(text, soft_wrap=True)


def _bars() -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    printer = output.console()
    return Bars(
        TimeElapsedColumn(),
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        console=printer,
        transient=True,
        disable=not printer.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
