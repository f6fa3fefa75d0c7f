"""Ctrl-C and SIGTERM, so that neither is lost.

Python raises them wherever it is. In a destructor or a weak reference's callback they go nowhere, and libraries turn
them into errors of their own: torch runs many callbacks, and its tracing reports a TypeError instead. So it is noted
that the signal came, and what was lost is raised at the end of the step, or in the error's place.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_received: list[int] = []


def watch() -> None:
    """Note signals from now on; called once, by the program. Ctrl-C stays ignored where the shell ignores it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _receive)
    signal.signal(signal.SIGTERM, _receive)
    sys.unraisablehook = _unraisable


def raise_lost() -> None:
    """Raise what a signal stands for if one came before: whoever gets here did not notice."""
    if _received:
        _raise(_received[-1])


@contextmanager
def instead_of_errors() -> Iterator[None]:
    """Raise what a signal stands for instead of an error that it may have caused."""
    try:
        yield
    except Exception:
        raise_lost()
        raise


def _receive(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signature of a signal handler
    _received.append(number)
    _raise(number)


def _raise(number: int) -> NoReturn:
    """Leave by an exception, so that half-written files are cleaned up."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _unraisable(ignored: UnraisableHookArgs) -> None:
    if not (_received and isinstance(ignored.exc_value, KeyboardInterrupt | SystemExit)):
        sys.__unraisablehook__(ignored)
